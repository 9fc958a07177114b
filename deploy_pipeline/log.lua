-- Appends to a log, and keeps its numbers gap-free whoever writes and however often a client repeats itself.
-- KEYS: the application's hash, the log's stream, its tail. The stream's entry ids are seq-0.
-- ARGV: <fence that the application must have, or ''> <source> <position that the source must have> <its new position>
--   <most bytes kept> <chunks...>
-- -> the source's position now, or -1 when the fence has moved on. Nothing is appended unless the position was the one named.

local app, stream, tail = KEYS[1], KEYS[2], KEYS[3]
local clock = redis.call('TIME')
local now = string.format('%.0f', tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000))
local at = 'at:' .. ARGV[2]

if ARGV[1] ~= '' and redis.call('HGET', app, 'fence') ~= ARGV[1] then return '-1' end
local position = redis.call('HGET', tail, at) or ''
if position ~= ARGV[3] then return position end
redis.call('HSET', tail, at, ARGV[4])

for i = 6, #ARGV do
  local seq = redis.call('HINCRBY', tail, 'last', 1)
  redis.call('XADD', stream, string.format('%.0f-0', seq), 't', now, 's', ARGV[2], 'd', ARGV[i])
  redis.call('HINCRBY', tail, 'bytes', #ARGV[i])
end
while tonumber(redis.call('HGET', tail, 'bytes') or '0') > tonumber(ARGV[5]) do
  local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  if not oldest then break end
  redis.call('XDEL', stream, oldest[1])
  redis.call('HINCRBY', tail, 'bytes', -#oldest[2][6])
  redis.call('HSET', tail, 'first', string.format('%.0f', tonumber(string.match(oldest[1], '^%d+')) + 1))
end
return ARGV[4]

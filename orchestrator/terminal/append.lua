-- Appends records to a session's output log; only what continues the last seq.
-- KEYS: stream, tail (hash), marks (list). All share the session's hash tag.
-- ARGV: retention in bytes, mark distance in bytes, what a record counts at least, channel, then for each
-- record: seq, offset, time, kind, data.
-- Answers {1, last, first} when all are in now, {0, last, first} when a record was not the next one (nothing after it
-- was taken), {-1, last, first} when the log is closed.
local stream, tail, marks = KEYS[1], KEYS[2], KEYS[3]
local retention, distance, least = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local known = redis.call('HMGET', tail, 'last', 'total', 'mark', 'first_total', 'first', 'closed')
local last, total = tonumber(known[1] or '0'), tonumber(known[2] or '0')
local mark, first_total = tonumber(known[3] or '0'), tonumber(known[4] or '0')
local first = tonumber(known[5] or '1')
if known[6] then return {-1, last, first} end
local complete, before = 1, last
for i = 5, #ARGV, 5 do
  local seq = tonumber(ARGV[i])
  if seq > last + 1 then
    complete = 0
    break
  elseif seq == last + 1 then
    local kind, data = ARGV[i + 3], ARGV[i + 4]
    redis.call('XADD', stream, ARGV[i] .. '-0', 'o', ARGV[i + 1], 't', ARGV[i + 2], 'k', kind, 'd', data)
    last = seq
    if total - mark >= distance then
      redis.call('RPUSH', marks, ARGV[i] .. ':' .. string.format('%.0f', total))
      mark = total
    end
    total = total + math.max(#data, least)
    if kind == '1' then
      redis.call('HSET', tail, 'state', 'running', 'size', data)
      redis.call('HDEL', tail, 'exit')
    elseif kind == '2' then
      redis.call('HSET', tail, 'state', 'exited', 'exit', data)
    elseif kind == '3' then
      redis.call('HSET', tail, 'size', data)
    end
  end
end
if last == before then return {complete, last, first} end
while total - first_total > retention do
  local oldest = redis.call('LPOP', marks)
  if not oldest then break end
  local seq, at = string.match(oldest, '(%d+):(%d+)')
  redis.call('XTRIM', stream, 'MINID', seq .. '-0')
  first, first_total = tonumber(seq), tonumber(at)
end
redis.call('HSET', tail, 'last', last, 'total', total, 'mark', mark, 'first_total', first_total, 'first', first)
redis.call('PUBLISH', ARGV[4], last)
return {complete, last, first}

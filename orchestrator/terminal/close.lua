-- Closes a session's output log for good: nothing is appended any more.
-- KEYS: stream, tail (hash), marks (list). All share the session's hash tag.
-- ARGV: time, data of the EXIT record to put there if the terminal's own end is not in the log, seconds for which the
-- output is kept (0: for ever), channel.
local stream, tail, marks = KEYS[1], KEYS[2], KEYS[3]
local known = redis.call('HMGET', tail, 'last', 'state', 'closed')
if known[3] then return 0 end
redis.call('HSET', tail, 'closed', '1')
if known[2] == 'running' then
  local last = tonumber(known[1]) + 1
  local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
  local offset, time = 0, tonumber(ARGV[1])
  if newest[1] then
    local fields = {}
    for i = 1, #newest[1][2], 2 do fields[newest[1][2][i]] = newest[1][2][i + 1] end
    offset = tonumber(fields.o)
    if fields.k == '0' then offset = offset + #fields.d end
    if tonumber(fields.t) > time then time = tonumber(fields.t) end
  end
  redis.call('XADD', stream, string.format('%.0f', last) .. '-0', 'o', string.format('%.0f', offset), 't', string.format('%.0f', time),
    'k', '2', 'd', ARGV[2])
  redis.call('HSET', tail, 'last', last, 'state', 'lost', 'exit', ARGV[2])
end
local keep_s = tonumber(ARGV[3])
if keep_s > 0 then
  redis.call('EXPIRE', stream, keep_s)
  redis.call('DEL', marks)
end
redis.call('PUBLISH', ARGV[4], 'closed')
return 1

-- Appends records to a session's output log; only what continues the last seq.
-- KEYS: stream, tail (hash), marks (list). All share the session's hash tag.
-- ARGV: retention in bytes, mark distance in bytes, then for each record: seq, offset, time, kind, data.
-- Answers {1, last} when all are in now, {0, last} when a record was not the next one (nothing after it was taken).
local stream, tail, marks = KEYS[1], KEYS[2], KEYS[3]
local retention, distance = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = redis.call('HMGET', tail, 'last', 'end', 'mark', 'first_offset')
local last, finish = tonumber(known[1] or '0'), tonumber(known[2] or '0')
local mark, first_offset = tonumber(known[3] or '0'), tonumber(known[4] or '0')
local complete = 1
for i = 3, #ARGV, 5 do
  local seq = tonumber(ARGV[i])
  if seq > last + 1 then
    complete = 0
    break
  elseif seq == last + 1 then
    local offset, kind, data = tonumber(ARGV[i + 1]), ARGV[i + 3], ARGV[i + 4]
    redis.call('XADD', stream, seq .. '-0', 'o', ARGV[i + 1], 't', ARGV[i + 2], 'k', kind, 'd', data)
    last = seq
    if kind == '0' then
      if offset - mark >= distance then
        redis.call('RPUSH', marks, seq .. ':' .. offset)
        mark = offset
      end
      finish = offset + #data
    elseif kind == '1' then
      redis.call('HSET', tail, 'state', 'running', 'size', data)
      redis.call('HDEL', tail, 'exit')
    elseif kind == '2' then
      redis.call('HSET', tail, 'state', 'exited', 'exit', data)
    elseif kind == '3' then
      redis.call('HSET', tail, 'size', data)
    end
  end
end
while finish - first_offset > retention do
  local oldest = redis.call('LPOP', marks)
  if not oldest then break end
  local seq, offset = string.match(oldest, '(%d+):(%d+)')
  redis.call('XTRIM', stream, 'MINID', seq .. '-0')
  redis.call('HSET', tail, 'first', seq)
  first_offset = tonumber(offset)
end
redis.call('HSET', tail, 'last', last, 'end', finish, 'mark', mark, 'first_offset', first_offset)
return {complete, last}

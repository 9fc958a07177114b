-- Moves a session along its table, once.
-- KEYS: session (hash). ARGV: field to set (status or ending_as), value, time, reason, channel, then the statuses it
-- may be in.
-- Answers 1 when it moved, 0 when its status does not allow it, -1 when there is no such session.
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return -1 end
local allowed = false
for i = 6, #ARGV do
  if ARGV[i] == status then allowed = true end
end
if not allowed then return 0 end
if ARGV[1] == 'ending_as' and redis.call('HGET', KEYS[1], 'ending_as') then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], 'updated_at_ms', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'status_reason', ARGV[4]) end
redis.call('PUBLISH', ARGV[5], ARGV[1])
return 1

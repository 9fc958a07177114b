-- Every step of the queue that has to be atomic. KEYS[1] is an application's hash; its deployments are the hashes
-- KEYS[1]:<id> and the sorted set KEYS[1]:deployments, all in the slot of the application's hash tag.
-- ARGV[1] names the step. The clock is the server's: a worker with a wrong one cannot steal or keep a lease.

local app = KEYS[1]
local index = app .. ':deployments'
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local KEPT_RECORDS = 100

local function text(number) return string.format('%.0f', number) end
local function record(id) return app .. ':' .. id end
local function get(field) return redis.call('HGET', app, field) or '' end

local function enter(id, state)
  if redis.call('HGET', record(id), 'state') ~= state then
    redis.call('HSET', record(id), 'state', state, 'at:' .. state, text(now))
  end
  redis.call('HSET', record(id), 'updated_at', text(now))
end

local function set_fields(id, first)
  for i = first, #ARGV, 2 do redis.call('HSET', record(id), ARGV[i], ARGV[i + 1]) end
end

local function free_lease()
  -- a new fence at once: whoever held the lease can no longer write, even before somebody else takes it
  redis.call('HINCRBY', app, 'fence', 1)
  redis.call('HSET', app, 'lease_until', '0', 'lease_owner', '', 'announced', '', 'updated_at', text(now))
end

local function activate(id, stage)
  redis.call('HSET', app, 'active_deployment_id', id, 'stage', stage, 'attempts', '0')
  free_lease()
end

local function trim()
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1 - KEPT_RECORDS)) do
    if id ~= get('current_deployment_id') and id ~= get('active_deployment_id') then
      redis.call('DEL', record(id))
      redis.call('ZREM', index, id)
    end
  end
end

local function holds(id, token)
  return get('active_deployment_id') == id and get('fence') == token
end

-- submit <id> <count of app fields> <app fields...> <deployment fields...> -> 1 when it is to be announced
local function submit()
  local id, count = ARGV[2], tonumber(ARGV[3])
  for i = 4, 3 + count, 2 do redis.call('HSETNX', app, ARGV[i], ARGV[i + 1]) end
  redis.call('HSETNX', app, 'created_at', text(now))
  redis.call('HSET', app, 'updated_at', text(now))
  set_fields(id, 4 + count)
  redis.call('HSET', record(id), 'created_at', text(now))
  enter(id, 'queued')
  redis.call('ZADD', index, redis.call('HINCRBY', app, 'submitted', 1), id)
  trim()
  if get('active_deployment_id') == '' then
    activate(id, 'archive')
    return 1
  end
  local earlier = get('waiting_deployment_id')
  if earlier ~= '' then
    redis.call('HSET', record(earlier), 'superseded_by', id)
    enter(earlier, 'superseded')
  end
  redis.call('HSET', app, 'waiting_deployment_id', id)
  return 0
end

-- claim <id> <stage> <owner> <lease ms> -> {token, attempt, deployment fields} or nil when there is nothing to do
local function claim()
  local id = ARGV[2]
  if get('active_deployment_id') ~= id or get('stage') ~= ARGV[3] or tonumber(get('lease_until')) > now then
    return nil
  end
  local token = redis.call('HINCRBY', app, 'fence', 1)
  local attempt = redis.call('HINCRBY', app, 'attempts', 1)
  redis.call('HSET', app, 'lease_until', text(now + tonumber(ARGV[5])), 'lease_owner', ARGV[4])
  return {token, attempt, redis.call('HGETALL', record(id))}
end

-- renew <id> <token> <lease ms> -> 1, or 0 when the claim is lost
local function renew()
  if not holds(ARGV[2], ARGV[3]) then return 0 end
  redis.call('HSET', app, 'lease_until', text(now + tonumber(ARGV[4])))
  return 1
end

-- release <id> <token> -> 1: given back unfinished, so it does not count as an attempt
local function release()
  if not holds(ARGV[2], ARGV[3]) then return 0 end
  redis.call('HINCRBY', app, 'attempts', -1)
  free_lease()
  return 1
end

-- advance <id> <token> <to> <comma-framed states it may come from> <next stage or ''> <fields...> -> 'ok' | 'lost' | state
local function advance()
  local id, to = ARGV[2], ARGV[4]
  if not holds(id, ARGV[3]) then return 'lost' end
  local from = redis.call('HGET', record(id), 'state')
  if not string.find(ARGV[5], ',' .. from .. ',', 1, true) then return from end
  enter(id, to)
  set_fields(id, 7)
  if ARGV[6] ~= '' then activate(id, ARGV[6]) end
  return 'ok'
end

-- finish: as advance, to a settled state; the waiting deployment becomes active -> {'ok', activated or '', replaced or ''}
local function finish()
  local outcome, id, to = advance(), ARGV[2], ARGV[4]
  if outcome ~= 'ok' then return {outcome, '', ''} end
  local replaced = ''
  if to == 'running' then
    replaced = get('current_deployment_id')
    if replaced ~= '' then enter(replaced, 'replaced') end
    redis.call('HSET', app, 'current_deployment_id', id, 'url', redis.call('HGET', record(id), 'url') or '')
  end
  local waiting = get('waiting_deployment_id')
  redis.call('HSET', app, 'active_deployment_id', '', 'waiting_deployment_id', '')
  free_lease()
  if waiting ~= '' then activate(waiting, 'archive') end
  return {'ok', waiting, replaced}
end

-- announced <id> <stage> <stream entry> : remembered, so that the sweep can tell whether the entry is still there
local function announced()
  if get('active_deployment_id') ~= ARGV[2] or get('stage') ~= ARGV[3] then return 0 end
  redis.call('HSET', app, 'announced', ARGV[4])
  return 1
end

-- unserved -> {id, stage, announced entry} when the active deployment has no live lease; {} busy; nil idle
local function unserved()
  local id = get('active_deployment_id')
  if id == '' then return nil end
  if tonumber(get('lease_until')) > now then return {} end
  return {id, get('stage'), get('announced')}
end

local steps = {
  submit = submit, claim = claim, renew = renew, release = release, advance = advance, finish = finish,
  announced = announced, unserved = unserved,
}
return steps[ARGV[1]]()

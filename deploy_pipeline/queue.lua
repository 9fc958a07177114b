-- Every step of the queue that has to be atomic. KEYS[1] is an application's hash; its deployments are the hashes
-- KEYS[1]:<id> and the sorted set KEYS[1]:deployments, all in the slot of the application's hash tag.
-- ARGV[1] names the step. The clock is the server's: a worker with a wrong one cannot steal or keep a lease.

local app = KEYS[1]
local index = app .. ':deployments'
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local KEPT_RECORDS = 100
local KEPT_LOGS = 20
local KEPT_RELEASES = 3

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

-- the last healthy releases, the oldest first: those that can be gone back to
local function kept()
  local ids = {}
  for id in string.gmatch(get('kept'), '[^,]+') do ids[#ids + 1] = id end
  return ids
end

local function is_kept(id)
  return string.find(',' .. get('kept') .. ',', ',' .. id .. ',', 1, true) ~= nil
end

local function trim()
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1 - KEPT_LOGS)) do
    local last = redis.call('HGET', record(id) .. ':log-tail', 'last')
    if redis.call('DEL', record(id) .. ':log') == 1 then  -- readers are told that it is gone
      redis.call('HSET', record(id) .. ':log-tail', 'first', text(tonumber(last) + 1), 'bytes', '0')
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1 - KEPT_RECORDS)) do
    if id ~= get('current_deployment_id') and id ~= get('active_deployment_id') and not is_kept(id) then
      redis.call('DEL', record(id), record(id) .. ':log', record(id) .. ':log-tail')
      redis.call('ZREM', index, id)
    end
  end
end

local function holds(id, token)
  return get('active_deployment_id') == id and get('fence') == token
end

local function is_cancelled(id)
  return (tonumber(redis.call('HGET', record(id), 'cancel_requested') or '0') or 0) > 0
end

-- the active deployment has settled: its place is the waiting one's, whose id is returned
local function free_place()
  local waiting = get('waiting_deployment_id')
  redis.call('HSET', app, 'active_deployment_id', '', 'waiting_deployment_id', '')
  free_lease()
  if waiting ~= '' then activate(waiting, 'archive') end
  return waiting
end

-- submit <id> <key of the request or ''> <seconds it is remembered> <hash of its body> <count of app fields>
--   <app fields...> <deployment fields...>
--   -> {1 when it is to be announced, id, hash of the body}: of the earlier deployment when the key was used before
local function submit()
  local id, asked, count = ARGV[2], app .. ':asked:' .. ARGV[3], tonumber(ARGV[6])
  local earlier = ARGV[3] ~= '' and redis.call('HMGET', asked, 'id', 'body') or {}
  if get('desired') == 'removed' then return {-1, id, ARGV[5]} end
  if earlier[1] and redis.call('EXISTS', record(earlier[1])) == 1 then
    local lost = get('active_deployment_id') == earlier[1] and get('announced') == ''
    return {lost and 1 or 0, earlier[1], earlier[2]}
  end
  if redis.call('EXISTS', record(id)) == 1 then return {1, id, ARGV[5]} end  -- the client ran this command twice
  for i = 7, 6 + count, 2 do redis.call('HSETNX', app, ARGV[i], ARGV[i + 1]) end
  redis.call('HSETNX', app, 'created_at', text(now))
  redis.call('HSET', app, 'updated_at', text(now))
  set_fields(id, 7 + count)
  redis.call('HSET', record(id), 'created_at', text(now))
  enter(id, 'queued')
  redis.call('ZADD', index, redis.call('HINCRBY', app, 'submitted', 1), id)
  if ARGV[3] ~= '' then
    redis.call('HSET', asked, 'id', id, 'body', ARGV[5])
    redis.call('EXPIRE', asked, ARGV[4])
  end
  trim()
  if get('active_deployment_id') == '' then
    activate(id, 'archive')
    return {1, id, ARGV[5]}
  end
  local waiting = get('waiting_deployment_id')
  if waiting ~= '' then
    redis.call('HSET', record(waiting), 'superseded_by', id)
    enter(waiting, 'superseded')
  end
  redis.call('HSET', app, 'waiting_deployment_id', id)
  return {0, id, ARGV[5]}
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

-- renew <id> <token> <lease ms> -> 'ok' | 'cancel' | 'lost'
local function renew()
  if not holds(ARGV[2], ARGV[3]) then return 'lost' end
  redis.call('HSET', app, 'lease_until', text(now + tonumber(ARGV[4])))
  return is_cancelled(ARGV[2]) and 'cancel' or 'ok'
end

-- release <id> <token> -> 1: given back unfinished, so it does not count as an attempt
local function release()
  if not holds(ARGV[2], ARGV[3]) then return 0 end
  redis.call('HINCRBY', app, 'attempts', -1)
  free_lease()
  return 1
end

-- advance <id> <token> <to> <comma-framed states it may come from> <next stage or ''> <fields...> -> 'ok' | 'lost' | 'cancel' | state
local function advance()
  local id, to = ARGV[2], ARGV[4]
  if not holds(id, ARGV[3]) then return 'lost' end
  if ARGV[1] == 'advance' and is_cancelled(id) then return 'cancel' end
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
    if replaced == id then replaced = '' end
    if replaced ~= '' then enter(replaced, 'replaced') end
    local ids = kept()
    ids[#ids + 1] = id
    local first = math.max(1, #ids - KEPT_RELEASES + 1)
    redis.call('HSET', app, 'current_deployment_id', id, 'url', redis.call('HGET', record(id), 'url') or '',
      'kept', table.concat(ids, ',', first), 'desired', 'running', 'obeyed', tonumber(get('ordered')) or 0,
      'health', 'running', 'health_reason', '', 'restarts', '0')
  end
  return {'ok', free_place(), replaced}
end

-- cancel <id> -> {what came of it, what became active, the stage}: 'none' when there is no such deployment; its state when it has
-- settled, perhaps right now, since nothing of it runs; 'asked' when a worker has to end what runs; 'unserved' likewise,
-- but nobody holds it
local function cancel()
  local id = ARGV[2]
  local state = redis.call('HGET', record(id), 'state')
  if not state then return {'none', '', ''} end
  if get('waiting_deployment_id') == id then
    redis.call('HSET', app, 'waiting_deployment_id', '')
    enter(id, 'cancelled')
    return {'cancelled', '', ''}
  end
  if get('active_deployment_id') ~= id then return {state, '', ''} end
  local served = tonumber(get('lease_until')) > now
  if not served and get('stage') == 'archive' then  -- the workspace's zip ends with its reader
    enter(id, 'cancelled')
    return {'cancelled', free_place(), ''}
  end
  if not is_cancelled(id) then redis.call('HSET', record(id), 'cancel_requested', text(now), 'updated_at', text(now)) end
  return {served and 'asked' or 'unserved', '', get('stage')}
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

-- rollback <new id> <release to go back to, or '': the one before the one that serves> <fields...> -> {outcome, id}
local function rollback()
  local id, target, current = ARGV[2], ARGV[3], get('current_deployment_id')
  if redis.call('EXISTS', record(id)) == 1 then return {'ok', id} end  -- the client ran this command twice
  if get('desired') == 'removed' then return {'removed', ''} end
  if get('active_deployment_id') ~= '' then return {'busy', get('active_deployment_id')} end
  if target == '' then
    for _, earlier in ipairs(kept()) do
      if earlier == current then break end
      target = earlier
    end
  end
  if target == '' or target == current or not is_kept(target) then return {'unknown', target} end
  for _, field in ipairs({'app_id', 'session_id', 'workspace_id', 'organization_id', 'archive_sha256', 'archive_bytes',
                          'kind', 'settings_version'}) do
    local value = redis.call('HGET', record(target), field)
    if value then redis.call('HSET', record(id), field, value) end
  end
  set_fields(id, 4)
  redis.call('HSET', record(id), 'id', id, 'rollback_of', target, 'created_at', text(now))
  enter(id, 'queued')
  redis.call('ZADD', index, redis.call('HINCRBY', app, 'submitted', 1), id)
  trim()
  activate(id, 'start')
  return {'ok', id}
end

-- order <stop | start | restart | remove> -> {outcome, number of the order}
local function order()
  local verb = ARGV[2]
  if redis.call('HEXISTS', app, 'id') == 0 then return {'none', 0} end
  if get('desired') == 'removed' then return {verb == 'remove' and 'ok' or 'removed', tonumber(get('ordered'))} end
  if verb ~= 'remove' and get('current_deployment_id') == '' then return {'nothing', 0} end
  local number = redis.call('HINCRBY', app, 'ordered', 1)
  redis.call('HSET', app, 'order', verb, 'order_error', '', 'ordered_at', text(now), 'updated_at', text(now),
    'desired', verb == 'stop' and 'stopped' or verb == 'remove' and 'removed' or 'running')
  return {'ok', number}
end

-- obeyed <number of the order> <what went wrong, or ''>
local function obeyed()
  if (tonumber(get('obeyed')) or 0) >= tonumber(ARGV[2]) then return 0 end
  redis.call('HSET', app, 'obeyed', ARGV[2], 'order_error', ARGV[3], 'updated_at', text(now))
  return 1
end

-- report <deployment> <health> <reason> <restarts> : of the release that serves
local function report()
  if get('current_deployment_id') ~= ARGV[2] then return 0 end
  redis.call('HSET', app, 'health', ARGV[3], 'health_reason', ARGV[4], 'restarts', ARGV[5])
  return 1
end

-- put_env <variables as JSON> -> their version; versions that no release can be started with any more go
local function put_env()
  if redis.call('HEXISTS', app, 'id') == 0 then return 0 end
  local version = redis.call('HINCRBY', app, 'settings_version', 1)
  redis.call('HSET', app .. ':env', version, ARGV[2])
  local used = {[tostring(version)] = true}
  local ids = kept()
  ids[#ids + 1] = get('active_deployment_id')
  for _, id in ipairs(ids) do used[redis.call('HGET', record(id), 'settings_version') or ''] = true end
  for _, old in ipairs(redis.call('HKEYS', app .. ':env')) do
    -- the one before as well: a worker may be about to start with it
    if not used[old] and tonumber(old) < version - 1 then redis.call('HDEL', app .. ':env', old) end
  end
  return version
end

-- forget -> 1 when all of the application is gone but its fence, which later claims have to go on from
local function forget()
  if get('desired') ~= 'removed' or get('active_deployment_id') ~= '' then return 0 end
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    redis.call('DEL', record(id), record(id) .. ':log', record(id) .. ':log-tail')
  end
  local fence = get('fence')
  redis.call('DEL', index, app, app .. ':env', app .. ':log', app .. ':log-tail')
  redis.call('HSET', app, 'fence', fence == '' and '0' or fence)
  return 1
end

local steps = {
  submit = submit, claim = claim, renew = renew, release = release, advance = advance, finish = finish,
  rollback = rollback, order = order, obeyed = obeyed, report = report, put_env = put_env, forget = forget,
  cancel = cancel, announced = announced, unserved = unserved,
}
return steps[ARGV[1]]()

-- Take an id for a request, unless a request holds it or its job has ended; publish the state STARTED.
-- Delete what an earlier job left under the id.
--
-- A campaign's fork that succeeded has no claim and no result: only its state shows that it has ended.
-- Half as expensive as a read and a transaction.
--
-- Return the result and the state as they were, the claim as it is now, and whether this call took the id (1 or 0).
local result_key, state_key, claim_key, open_key = unpack(KEYS)
local job_id, ttl, claim, started, never_seen, prefix, earlier_names = unpack(ARGV)

local result, state, holder = unpack(redis.call('MGET', result_key, state_key, claim_key))
local has_ended = result or state and string.find(state, '^{"status": ?"SUCCESS"')
if holder or has_ended then return {result, state, holder, 0} end

local answer = redis.pcall('SET', claim_key, claim, 'EX', ttl)
if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
if not state then
    redis.call('SET', state_key, started, 'EX', ttl)
    redis.call('PUBLISH', state_key, started)
end
redis.call('ZADD', open_key, 'NX', never_seen, job_id)
redis.call('EXPIRE', open_key, ttl)

local earlier = {}
for name in string.gmatch(earlier_names, '%S+') do earlier[#earlier + 1] = prefix .. name end
redis.call('DEL', unpack(earlier))
return {result, state, claim, 1}

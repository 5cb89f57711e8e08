-- Take the ids of some jobs for requests, each unless a request holds it or its job has ended. Delete what an earlier
-- job left under an id that is taken. Store and publish the state STARTED of each job without a state, if `started`
-- is given.
--
-- A campaign's fork that succeeded has no claim and no result: only its state shows that it has ended.
-- Half as expensive as a read and a transaction.
--
-- Further keys: the result, state, claim and cancellation of each job. Further arguments: the id, the claim, `started`
-- or nothing, and the prefix of the keys of each job. The ids differ.
--
-- Return of each job the result and the state as they were, the claim as it is now, the cancellation, and whether this
-- call took the id (1 or 0).
local open_key = unpack(KEYS, 1, 1)
local ttl, never_seen, earlier_names = unpack(ARGV, 1, 3)

local asked = {}
for n = 2, #KEYS do asked[n - 1] = KEYS[n] end
local found = redis.call('MGET', unpack(asked))

local answers, opened, earlier = {}, {}, {}
for n = 0, #asked / 4 - 1 do
    local result, state, holder, cancelled = unpack(found, 4 * n + 1, 4 * n + 4)
    local state_key, claim_key = asked[4 * n + 2], asked[4 * n + 3]
    local job_id, claim, started, prefix = unpack(ARGV, 4 * n + 4, 4 * n + 7)
    local has_ended = result or state and string.find(state, '^{"status": ?"SUCCESS"')
    local is_new = not holder and not has_ended
    if is_new then
        local answer = redis.pcall('SET', claim_key, claim, 'EX', ttl)
        if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
        opened[#opened + 1], opened[#opened + 2] = never_seen, job_id
        for name in string.gmatch(earlier_names, '%S+') do earlier[#earlier + 1] = prefix .. name end
    end
    if not state and not has_ended and started ~= '' then
        redis.call('SET', state_key, started, 'EX', ttl)
        redis.call('PUBLISH', state_key, started)
    end
    for _, value in ipairs({result, state, is_new and claim or holder, cancelled, is_new and 1 or 0}) do
        answers[#answers + 1] = value
    end
end
if #opened > 0 then
    redis.call('ZADD', open_key, 'NX', unpack(opened))
    redis.call('EXPIRE', open_key, ttl)
    redis.call('DEL', unpack(earlier))
end
return answers

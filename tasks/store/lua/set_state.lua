-- Store and publish states of Celery's. Where the present state is final, keep it and publish that one again instead.
-- Remove jobs that have ended from the open ones.
--
-- Further keys: those of the states. Further arguments: of each, the state, and the id of the job if it is to be removed,
-- or nothing. `final_states` are words, each with a space before and after it.
local open_key = unpack(KEYS, 1, 1)
local ttl, final_states = unpack(ARGV, 1, 2)

local ended = {}
for n = 2, #KEYS do
    local state_key, record, job_id = KEYS[n], ARGV[2 * n - 1], ARGV[2 * n]
    local before = redis.pcall('SET', state_key, record, 'EX', ttl, 'GET')
    if type(before) == 'table' and before.err then
        return redis.error_reply(string.match(before.err, 'OOM .*') or before.err)
    end
    local word = before and string.match(before, '^{"status": ?"(%u+)"')
    if word and string.find(final_states, ' ' .. word .. ' ', 1, true) then
        redis.call('SET', state_key, before, 'EX', ttl)
        record = before
    end
    redis.call('PUBLISH', state_key, record)
    if job_id ~= '' then ended[#ended + 1] = job_id end
end
if #ended > 0 then redis.call('ZREM', open_key, unpack(ended)) end

-- Store and publish a state of Celery's. Where the present state is final, keep it and publish that one again instead.
-- `final_states` are words, each with a space before and after it.
local state_key = unpack(KEYS)
local record, ttl, final_states = unpack(ARGV)

local before = redis.pcall('SET', state_key, record, 'EX', ttl, 'GET')
if type(before) == 'table' and before.err then
    return redis.error_reply(string.match(before.err, 'OOM .*') or before.err)
end
local word = before and string.match(before, '^{"status": ?"(%u+)"')
if word and string.find(final_states, ' ' .. word .. ' ', 1, true) then
    redis.call('SET', state_key, before, 'EX', ttl)
    record = before
end
return redis.call('PUBLISH', state_key, record)

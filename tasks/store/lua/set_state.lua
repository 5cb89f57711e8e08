-- Store and publish a state of Celery's. Where the present state is final, publish that one again instead.
-- `final_states` are words, each with a space before and after it.
local state_key = unpack(KEYS)
local record, ttl, final_states = unpack(ARGV)

local current = redis.call('GET', state_key)
local word = current and string.match(current, '^{"status": ?"(%u+)"')
if word and string.find(final_states, ' ' .. word .. ' ', 1, true) then
    return redis.call('PUBLISH', state_key, current)
end
local answer = redis.pcall('SET', state_key, record, 'EX', ttl)
if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
return redis.call('PUBLISH', state_key, record)

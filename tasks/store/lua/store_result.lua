-- Store the final result of a job, and set the TTL of all its keys to that of the result.
local result_key = unpack(KEYS)
local result, ttl, prefix, names = unpack(ARGV)

local answer = redis.pcall('SET', result_key, result, 'EX', ttl)
if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
for name in string.gmatch(names, '%S+') do
    if redis.call('EXPIRE', prefix .. name, ttl) == 1 and name == 'pages' then
        local parts = redis.call('HGETALL', prefix .. 'pages')
        for n = 1, #parts, 2 do
            for page = 0, tonumber(parts[n + 1]) - 1 do
                redis.call('EXPIRE', prefix .. 'page:' .. parts[n] .. ':' .. string.format('%d', page), ttl)
            end
        end
    end
end

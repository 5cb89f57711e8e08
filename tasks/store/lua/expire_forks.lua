-- Set the TTL of the keys of some forks of a campaign. `last` is the number of the last fork, which is included.
local state_prefix, own_prefix, first, last, ttl = unpack(ARGV)

for n = tonumber(first), tonumber(last) do
    local number = string.format('%.0f', n)
    local own = own_prefix .. number .. ':'
    redis.call('EXPIRE', state_prefix .. number, ttl)
    redis.call('EXPIRE', own .. 'result', ttl)
    if redis.call('EXPIRE', own .. 'page', ttl) == 0 and redis.call('EXPIRE', own .. 'pages', ttl) == 1 then
        for page = 0, tonumber(redis.call('HGET', own .. 'pages', '0') or 0) - 1 do
            redis.call('EXPIRE', own .. 'page:0:' .. string.format('%d', page), ttl)
        end
    end
end

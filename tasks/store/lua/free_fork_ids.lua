-- Delete what an earlier campaign left under the ids of some forks, unless the campaign has started.
-- `last` is the number of the last fork, which is included.
--
-- Return the number of the first fork whose id another job holds, or -1.
local campaign_claim_key = unpack(KEYS)
local state_prefix, own_prefix, first, last = unpack(ARGV)

local has_started = redis.call('EXISTS', campaign_claim_key) == 1
for n = tonumber(first), tonumber(last) do
    local number = string.format('%.0f', n)
    local own = own_prefix .. number .. ':'
    if redis.call('EXISTS', own .. 'claim') == 1 then return number end
    if not has_started then
        redis.call('DEL', state_prefix .. number, own .. 'result', own .. 'page', own .. 'pages')
    end
end
return '-1'

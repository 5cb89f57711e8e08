-- For each queue, how many messages were taken from it and not acknowledged.
--
-- kombu keeps each such message in a hash as JSON: [message, exchange, routing key]. The routing key is the queue, whose
-- name needs no escapes. Only the end of an entry is read: a message may be large.
local unacked_key = unpack(KEYS)

local counts = {}
for n = 1, #ARGV do counts[ARGV[n]] = 0 end
for _, entry in ipairs(redis.call('HVALS', unacked_key)) do
    local queue = string.match(string.sub(entry, -300), '"([^"]*)"%]$')
    if queue and counts[queue] then counts[queue] = counts[queue] + 1 end
end
local answer = {}
for n = 1, #ARGV do answer[n] = counts[ARGV[n]] end
return answer

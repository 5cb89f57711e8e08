-- Return messages to the head of their queue, each unless it was acknowledged or redelivered meanwhile.
-- Further arguments: the delivery tag and the message of each, the youngest first.
local queue_key, unacked_key, index_key = unpack(KEYS)

for n = 1, #ARGV, 2 do
    if redis.call('HDEL', unacked_key, ARGV[n]) == 1 then redis.call('RPUSH', queue_key, ARGV[n + 1]) end
    redis.call('ZREM', index_key, ARGV[n])
end

-- Move an unacknowledged message back into its queue, unless its worker has renewed or finished it since it was read.
-- `entry` is the entry as it was read; `latest` is the time before which the message must have been taken.
--
-- Return 1 if the message was moved, else 0.
local unacked_key, index_key, queue = unpack(KEYS)
local tag, entry, latest, message = unpack(ARGV)

local taken = redis.call('ZSCORE', index_key, tag)
if not taken or tonumber(taken) > tonumber(latest) or redis.call('HGET', unacked_key, tag) ~= entry then return 0 end
redis.call('RPUSH', queue, message)
redis.call('HDEL', unacked_key, tag)
redis.call('ZREM', index_key, tag)
return 1

-- Record that the cancellation of a job was requested, unless the job has ended: the flag would cancel the next job
-- of that id.
local cancel_key, result_key = unpack(KEYS)
local flag, ttl = unpack(ARGV)

if redis.call('EXISTS', result_key) == 0 then redis.call('SET', cancel_key, flag, 'EX', ttl, 'NX') end

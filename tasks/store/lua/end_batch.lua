-- Record that a batch of a campaign is done, if the results of all its runs are stored. Returns 1 if they are, else 0.
--
-- A Redis that is killed forgets its last second, and a process that waited for it repeats only its last command. If
-- that recorded a batch whose results are lost, no process would store them again, and the campaign would never end.
--
-- Further arguments: the index of the first fork of each run.
local settled_key, batches_key = unpack(KEYS)
local first, ttl = unpack(ARGV, 1, 2)

for n = 3, #ARGV do
    if redis.call('GETBIT', settled_key, ARGV[n]) == 0 then return 0 end
end
local answer = redis.pcall('SETBIT', batches_key, first, 1)
if type(answer) == 'table' and answer.err then
    return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
end
redis.call('EXPIRE', batches_key, ttl)
return 1

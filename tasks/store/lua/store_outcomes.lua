-- Store the results of a run of a campaign's forks once, and add them to the campaign's sums.
--
-- In one command: a process that paused between a read and a write would count the forks twice. A campaign that has
-- its result takes no more: what a batch made since then is not in its sums. From the time that a process closed it
-- (the field `closed` of the sums) until then, it takes only what a process stores that ends it (`ends` is 1).
--
-- Further keys: the state of each fork; other keys; the hash that counts the pages of each fork with several.
-- Further arguments: the states; the values of the other keys; name and value of each sum; the counts of pages; of
-- each failure the fork's number and the failure. The `_count` arguments say how many there are of each.
local settled_key, sums_key, failed_key, result_key = unpack(KEYS, 1, 4)
local first, ends, ttl, most_failures, state_count, other_count, sum_count, page_count = unpack(ARGV, 1, 8)

if redis.call('GETBIT', settled_key, first) == 1 or redis.call('EXISTS', result_key) == 1 then return end
if ends == '0' and redis.call('HGET', sums_key, 'closed') then return end
local answer = redis.pcall('SETBIT', settled_key, first, 1)
if type(answer) == 'table' and answer.err then
    return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
end

state_count, other_count = tonumber(state_count), tonumber(other_count)
local key, arg = 4, 8
for n = 1, state_count + other_count do
    redis.call('SET', KEYS[key + n], ARGV[arg + n], 'EX', ttl)
    if n <= state_count then redis.call('PUBLISH', KEYS[key + n], ARGV[arg + n]) end
end
key, arg = key + state_count + other_count, arg + state_count + other_count
for n = 1, tonumber(sum_count) do
    local sum = redis.pcall('HINCRBY', sums_key, ARGV[arg + 1], ARGV[arg + 2])
    -- Redis counts up to 2^63 - 1. Sparse files of EiB exceed that: the sum of their bytes then stays there.
    if type(sum) == 'table' and sum.err then
        redis.call('HSET', sums_key, ARGV[arg + 1], '9223372036854775807')
    end
    arg = arg + 2
end
for n = 1, tonumber(page_count) do
    redis.call('HSET', KEYS[key + n], '0', ARGV[arg + n])
    redis.call('EXPIRE', KEYS[key + n], ttl)
end
arg = arg + tonumber(page_count)
for n = arg + 1, #ARGV, 2 do redis.call('ZADD', failed_key, ARGV[n], ARGV[n + 1]) end
for _, later in ipairs(redis.call('ZRANGE', failed_key, tonumber(most_failures), -1)) do redis.call('ZREM', failed_key, later) end
for _, own in ipairs({settled_key, sums_key, failed_key}) do redis.call('EXPIRE', own, ttl) end

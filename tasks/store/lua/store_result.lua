-- Store the final results of jobs, and set the TTL of all keys of each job to that of its result. A result that another
-- process has stored stays.
--
-- Most jobs have no keys but `usual`: one look for all jobs shows whether the others of `names` are to be searched.
--
-- Further keys: the result and the canvas of each job. Further arguments: the result, and the prefix of the keys of each.
-- Return of each job the result that stays, if there is one, or else whether tasks are to be sent after it (1 or 0).
local ttl, usual, names = unpack(ARGV, 1, 3)

local function expire_others(prefix)
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
end

local answers, others = {}, {}
for n = 1, #KEYS / 2 do
    local result_key, canvas_key = KEYS[2 * n - 1], KEYS[2 * n]
    local result, prefix = ARGV[2 * n + 2], ARGV[2 * n + 3]
    local answer = redis.pcall('SET', result_key, result, 'EX', ttl, 'NX')
    if type(answer) == 'table' and answer.err then
        return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
    end
    local earlier = not answer and redis.call('GET', result_key)
    answers[n] = earlier and earlier ~= result and earlier or 0
    if answers[n] == 0 then
        for name in string.gmatch(usual, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
        others[#others + 1] = canvas_key
        for name in string.gmatch(names, '%S+') do others[#others + 1] = prefix .. name end
    end
end
if #others == 0 or redis.call('EXISTS', unpack(others)) == 0 then return answers end

for n = 1, #answers do
    if answers[n] == 0 then
        expire_others(ARGV[2 * n + 3])
        answers[n] = redis.call('EXISTS', KEYS[2 * n])
    end
end
return answers

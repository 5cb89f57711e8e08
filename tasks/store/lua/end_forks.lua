-- Store the ends of small forks that succeeded: the final result, the FileResults, and Celery's state, which is published
-- too. Set the TTL of all keys of each fork to that of its result. A result that another process has stored stays, with
-- all that belongs to it, and so does a final state.
--
-- No sweep has to look at such a fork, unless tasks follow it.
--
-- Such a fork has no keys but `usual`: one look tells whether an earlier attempt, or its client, left others of `names`.
-- The pages of an earlier attempt belong to no result.
--
-- Further keys: the result, the page, the state and the canvas of each fork. Further arguments: the id, the result, the
-- page, the state, and the prefix of the keys of each. `final_states` are words, each with a space before and after it.
--
-- Return of each fork the result that stays, if there is one, or else whether tasks are to be sent after it (1 or 0).
local open_key = unpack(KEYS, 1, 1)
local ttl, usual, names, final_states = unpack(ARGV, 1, 4)

local function store(key, value)
    local answer = redis.pcall('SET', key, value, 'EX', ttl, 'NX')
    return answer, type(answer) == 'table' and answer.err
end

local function publish(state_key, record)
    local before = redis.call('SET', state_key, record, 'EX', ttl, 'GET')
    local word = before and string.match(before, '^{"status": ?"(%u+)"')
    if word and string.find(final_states, ' ' .. word .. ' ', 1, true) then
        redis.call('SET', state_key, before, 'EX', ttl)
        record = before
    end
    redis.call('PUBLISH', state_key, record)
end

local function has_followers(prefix, canvas_key)
    for name in string.gmatch(usual, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
    local others = {canvas_key}
    for name in string.gmatch(names, '%S+') do others[#others + 1] = prefix .. name end
    if redis.call('EXISTS', unpack(others)) == 0 then return 0 end

    redis.call('DEL', prefix .. 'pages')
    for name in string.gmatch(names, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
    return redis.call('EXISTS', canvas_key)
end

local answers, closed = {}, {}
for n = 0, (#KEYS - 1) / 4 - 1 do
    local result_key, page_key, state_key, canvas_key = unpack(KEYS, 4 * n + 2, 4 * n + 5)
    local job_id, result, page, record, prefix = unpack(ARGV, 5 * n + 5, 5 * n + 9)
    local is_stored, refusal = store(result_key, result)
    if refusal then return redis.error_reply(string.match(refusal, 'OOM .*') or refusal) end
    local earlier = not is_stored and redis.call('GET', result_key)
    if earlier and earlier ~= result then
        answers[n + 1] = earlier
    else
        redis.call('SET', page_key, page, 'EX', ttl)
        answers[n + 1] = has_followers(prefix, canvas_key)
        publish(state_key, record)
        if answers[n + 1] == 0 then closed[#closed + 1] = job_id end
    end
end
if #closed > 0 then redis.call('ZREM', open_key, unpack(closed)) end
return answers

-- Store the results of small forks that succeeded, with their FileResults. Set the TTL of all keys of each fork to that
-- of its result. A result that another process has stored stays, with its FileResults.
--
-- Such a fork has no keys but `usual`: one look tells whether an earlier attempt, or its client, left others of `names`.
-- The pages of an earlier attempt belong to no result.
--
-- Further keys: the result, the page and the canvas of each fork. Further arguments: the result, the page, and the prefix
-- of the keys of each.
--
-- Return of each fork the result that stays, if there is one, or else whether tasks are to be sent after it (1 or 0).
local ttl, usual, names = unpack(ARGV, 1, 3)

local function has_followers(prefix, canvas_key)
    for name in string.gmatch(usual, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
    local others = {canvas_key}
    for name in string.gmatch(names, '%S+') do others[#others + 1] = prefix .. name end
    if redis.call('EXISTS', unpack(others)) == 0 then return 0 end

    redis.call('DEL', prefix .. 'pages')
    for name in string.gmatch(names, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
    return redis.call('EXISTS', canvas_key)
end

local answers = {}
for n = 0, #KEYS / 3 - 1 do
    local result_key, page_key, canvas_key = unpack(KEYS, 3 * n + 1, 3 * n + 3)
    local result, page, prefix = unpack(ARGV, 3 * n + 4, 3 * n + 6)
    local is_stored = redis.pcall('SET', result_key, result, 'EX', ttl, 'NX')
    if type(is_stored) == 'table' and is_stored.err then
        return redis.error_reply(string.match(is_stored.err, 'OOM .*') or is_stored.err)
    end
    local earlier = not is_stored and redis.call('GET', result_key)
    if earlier and earlier ~= result then
        answers[n + 1] = earlier
    else
        redis.call('SET', page_key, page, 'EX', ttl)
        answers[n + 1] = has_followers(prefix, canvas_key)
    end
end
return answers

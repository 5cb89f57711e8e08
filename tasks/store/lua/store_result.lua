-- Store the final result of a job, and set the TTL of all keys of the job to its own. A result that another process
-- has stored stays.
--
-- Most jobs have no keys but `usual`: one look tells whether the others of `names` are to be searched.
-- Return the result that stays, if there is one, or else whether tasks are to be sent after the job (1 or 0).
local result_key, canvas_key = unpack(KEYS)
local result, ttl, prefix, usual, names = unpack(ARGV)

local answer = redis.pcall('SET', result_key, result, 'EX', ttl, 'NX')
if type(answer) == 'table' and answer.err then
    return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
end
if not answer then
    local earlier = redis.call('GET', result_key)
    if earlier ~= result then return earlier end
end

for name in string.gmatch(usual, '%S+') do redis.call('EXPIRE', prefix .. name, ttl) end
local others = {canvas_key}
for name in string.gmatch(names, '%S+') do others[#others + 1] = prefix .. name end
if redis.call('EXISTS', unpack(others)) == 0 then return 0 end

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
return redis.call('EXISTS', canvas_key)

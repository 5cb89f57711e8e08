-- Take the oldest messages of a queue, up to `most`, while each is a plain request for one fork: with no time to begin
-- or to end, no stamps, of at most `longest` bytes, and not returned to the queue before. Record them as
-- unacknowledged, as kombu does; `tag` and a number are their delivery tags.
--
-- The list keeps them until they are recorded: a full Redis refuses the record.
-- Return the messages, the oldest first.
local queue_key, unacked_key, index_key = unpack(KEYS)
local most, longest, task, now, tag, place = unpack(ARGV)

-- What is taken must be JSON for Python too, since kombu reads the record when the process dies. By default, cjson also
-- reads control characters, bytes that are not UTF-8, numbers like 0x10, and deep nesting. The settings are those of all
-- scripts, so they are set back.
local function decoded(text)
    cjson.decode_invalid_numbers(false)
    cjson.decode_max_depth(50)
    local readable, message = pcall(cjson.decode, text)
    cjson.decode_invalid_numbers(true)
    cjson.decode_max_depth(1000)
    return readable, message
end

local function is_plain(text)
    if #text > tonumber(longest) or string.find(text, '[^\32-\126]') then return false end
    local readable, message = decoded(text)
    if not readable or type(message) ~= 'table' then return false end
    local headers, properties = message.headers, message.properties
    if type(headers) ~= 'table' or type(properties) ~= 'table' then return false end
    if headers.task ~= task or type(properties.delivery_info) ~= 'table' then return false end
    for _, name in ipairs({'eta', 'expires', 'compression', 'redelivered', 'ordinary'}) do
        if headers[name] ~= nil and headers[name] ~= cjson.null then return false end
    end
    if type(headers.stamps) == 'table' and next(headers.stamps) then return false end
    for _, limit in ipairs(type(headers.timelimit) == 'table' and headers.timelimit or {}) do
        if limit ~= cjson.null then return false end
    end
    return true
end

local taken, entries, times = {}, {}, {}
local waiting = redis.call('LRANGE', queue_key, -most, -1)
for n = #waiting, 1, -1 do
    if not is_plain(waiting[n]) then break end
    taken[#taken + 1] = waiting[n]
    local own_tag = tag .. '.' .. #taken
    entries[#entries + 1], entries[#entries + 2] = own_tag, '[' .. waiting[n] .. ',' .. place .. ']'
    times[#times + 1], times[#times + 2] = now, own_tag
end
if #taken == 0 then return taken end

local answer = redis.pcall('HSET', unacked_key, unpack(entries))
if type(answer) == 'table' and answer.err then
    return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err)
end
redis.call('ZADD', index_key, unpack(times))
redis.call('LTRIM', queue_key, 0, -#taken - 1)
return taken

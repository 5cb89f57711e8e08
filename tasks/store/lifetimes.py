"""How long Redis keeps what belongs to a job.

Until a job has ended, each of its keys has a TTL of `open_ttl`: no renewal by a worker is needed, so neither a job that
takes longer than `FORKVM_RESULT_EXPIRES` nor workers that are down that long lose anything. Its end gives all of them
the TTL `FORKVM_RESULT_EXPIRES` in one step, so that they expire together and the id is then free as a whole.
"""

from __future__ import annotations

#: TTL of each key of a job that has not ended, in seconds: 30 days. Only a client that is never answered leaves one.
OPEN_SECONDS = 30 * 86_400

#: What is kept of a job under a key of its own beside its result, its state, and the pages of its parts.
OF_JOB = ("claim", "cancel", "progress", "pages", "page", "sums", "settled", "batches", "failed")
#: What an earlier job under an id may have left to the next one. Its cancellation flag is not among it: a job can be
#: cancelled before a worker has begun it. `failures` was written by versions up to 0.1.
OF_EARLIER_JOB = ("progress", "pages", "page", "losses", "sums", "settled", "batches", "failed", "failures")


def _words(names: tuple[str, ...]) -> str:
    """Names as the arguments of a function in Lua: that is cheaper than a key of Redis each with every call."""
    return ", ".join(f"'{name}'" for name in names)


#: Keeps the final result of a job, and has all that is kept of the job expire with it. About `pcall`
#: see `campaigns.store_result`.
#:
#: KEYS: result. ARGV: the result, its TTL, and how the job's keys begin.
SETTLE = f"""
local answer = redis.pcall('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if answer.err then return redis.error_reply(string.match(answer.err, 'OOM .*') or answer.err) end
for _, name in ipairs({{{_words(OF_JOB)}}}) do
    if redis.call('EXPIRE', ARGV[3] .. name, ARGV[2]) == 1 and name == 'pages' then
        local parts = redis.call('HGETALL', ARGV[3] .. 'pages')
        for n = 1, #parts, 2 do
            for page = 0, tonumber(parts[n + 1]) - 1 do
                redis.call('EXPIRE', ARGV[3] .. 'page:' .. parts[n] .. ':' .. string.format('%d', page), ARGV[2])
            end
        end
    end
end
"""

#: Deletes what an earlier job left; a part of a script. `own` is how the job's keys begin.
FORGET = f"""
local earlier = {{{_words(OF_EARLIER_JOB)}}}
for n, name in ipairs(earlier) do earlier[n] = own .. name end
redis.call('DEL', unpack(earlier))
"""

#: Notes that the end of a job was asked for, unless it has ended: the flag would end the next job of that id.
#:
#: KEYS: cancel, result. ARGV: the flag, its TTL.
CANCEL = """
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2], 'NX') end
"""


def open_ttl(expires: int) -> int:
    """The TTL of what belongs to a job that has not ended, where results expire after `expires`; both in seconds."""
    return max(expires, OPEN_SECONDS)

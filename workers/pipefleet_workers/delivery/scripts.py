"""The Lua that moves messages between the lists of a queue, its leases and its dead letters. Each script is atomic.

KEYS[1..8] are the same in every script, in the order of `leases.LeaseKeys`. Times come from the server's clock, in microseconds
inside the scripts and in seconds in the keys. The worker whose owner string stands in `owners` holds the lease. Every later step
of a worker compares this string first, so a script changes nothing when it is repeated after a lost reply, or after another worker
took the message. `transport` sends FETCH and GATHER; `ledger` and `settlements` send the others.
"""

from __future__ import annotations

from pipefleet.contract.messages import MAX_WIRE_BYTES
from pipefleet.queues.dead_letters import MOST_LETTER_BYTES, MOST_READ_BYTES
from pipefleet.queues.keys import ARRIVING

_COMMON = (
    f"local ARRIVING, MOST = '{ARRIVING}', {MAX_WIRE_BYTES}"
    + r"""
local unacked, index, deliveries, retries, owners, delayed, dead, unreported =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]

redis.call('HDEL', owners, '')  -- changes nothing: a server at maxmemory refuses a script whose first write may take memory

local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function seconds(us)
  return string.format('%d.%06d', math.floor(us / 1000000), us % 1000000)
end

local function text_of(record)
  return record and string.match(record, '^%[(.*), "[^"\\]*", "[^"\\]*"%]$')
end

-- Messages that woke a worker go back to the head of their list, in their order. If one of the keys is no list, they stay.
local function gather(list)
  while type(redis.pcall('LMOVE', list .. ARRIVING, list, 'LEFT', 'RIGHT')) == 'string' do end
end

-- Push to the head of a list. False if its key holds another type; any other error ends the script.
local function push(list, text)
  gather(list)
  local done = redis.pcall('RPUSH', list, text)
  if type(done) == 'table' and not string.find(done.err, 'WRONGTYPE', 1, true) then
    done = redis.call('RPUSH', list, text)
  end
  return type(done) == 'number'
end

-- A value that is no count, which only another program writes, counts as 0.
local function count_of(key, tag)
  local found = redis.call('HGET', key, tag)
  return found and string.find(found, '^%d%d?%d?%d?%d?%d?$') and tonumber(found) or 0
end

local function forget(tag)
  redis.call('ZREM', index, tag)
  redis.call('ZREM', delayed, tag)
  for _, key in ipairs({unacked, deliveries, retries, owners}) do redis.call('HDEL', key, tag) end
end

local function release(tag)
  redis.call('ZREM', index, tag)
  redis.call('ZREM', delayed, tag)
  redis.call('HDEL', unacked, tag)
  redis.call('HDEL', owners, tag)
end

-- Only the beginning is kept of a text that is too large to be delivered: no reader of letters could read it whole.
local function bury(reason, queue, count, text)
  if #text > MOST then text = string.sub(text, 1, 1000) end
  redis.call('LPUSH', unreported, cjson.encode(
    {reason = reason, at = clock() / 1000000, queue = queue, deliveries = count, message = text}))
end
"""
)

FETCH = (
    _COMMON
    + r"""
-- ARGV: messages, messages of the low lists, position of the first low list, most deliveries, owner, queue of each list.
-- Messages are read, then recorded, then popped: a command that fails in the middle leaves a message twice, never lost. The length
-- of a message is known only after it is read, so a few are read at a time, and some megabytes in all.
-- Returns the owner, the number of buried messages, the taken messages, and 1 if it stopped before its lists were empty.
local AT_ONCE, MOST_TAKEN = 8, 8 * 1024 * 1024
local us, left, low_left = clock(), tonumber(ARGV[1]), tonumber(ARGV[2])
local first_low, most = 8 + tonumber(ARGV[3]), tonumber(ARGV[4])
local owner = ARGV[5] .. '@' .. seconds(us)
local taken, buried, bytes = {}, 0, 0

local function flaw(readable, m)
  if not readable then return 'it is not JSON' end
  if type(m) ~= 'table' then return 'it is not a JSON object' end
  if type(m.properties) ~= 'table' then return 'it has no properties' end
  local tag = m.properties.delivery_tag
  if type(tag) ~= 'string' or tag == '' or #tag > 512 then return 'it has no delivery tag' end
  if type(m.properties.delivery_info) ~= 'table' then return 'it has no delivery info' end
end

-- The next texts of a list; none if its key holds another type. Any other error ends the script.
local function next_of(list, room)
  local found = redis.pcall('LRANGE', list, -room, -1)
  if found.err and string.find(found.err, 'WRONGTYPE', 1, true) then return {} end
  return found.err and redis.call('LRANGE', list, -room, -1) or found
end

local function take(text, position, queue)
  bytes = bytes + #text
  if #text > MOST then
    buried = buried + 1
    return bury('too_large: its message has ' .. #text .. ' bytes, and a worker takes ' .. MOST, queue, 0, text)
  end
  local readable, m = pcall(cjson.decode, text)
  local why = flaw(readable, m)
  if why then
    buried = buried + 1
    return bury(why, queue, 0, text)
  end
  local tag, record = m.properties.delivery_tag, '[' .. text .. ', "", "' .. queue .. '"]'
  local held = redis.call('HGET', unacked, tag)
  if held and redis.call('ZSCORE', index, tag) then
    if held ~= record then
      buried = buried + 1
      bury('another message has its delivery tag', queue, 0, text)
    end
    return
  end
  local count = count_of(deliveries, tag) + 1
  redis.call('HSET', deliveries, tag, count)
  local shard = type(m.headers) == 'table' and m.headers['pipefleet-shard'] == true
  if count > most and not shard then
    buried = buried + 1
    bury('delivered ' .. (count - 1) .. ' times', queue, count - 1, text)
    return forget(tag)
  end
  redis.call('HSET', unacked, tag, record)
  redis.call('HSET', owners, tag, owner)
  redis.call('ZADD', index, seconds(us + #taken), tag)
  taken[#taken + 1] = {position, tag, text, count, count_of(retries, tag)}
  return true
end

for k = 9, #KEYS do
  local low = k >= first_low
  gather(KEYS[k])
  while buried < 100 and bytes < MOST_TAKEN do
    local room = math.min(AT_ONCE, left, low and low_left or left)
    if room <= 0 then break end
    local texts = next_of(KEYS[k], room)
    if #texts == 0 then break end
    for i = #texts, 1, -1 do
      if take(texts[i], k - 9, ARGV[k - 3]) then
        left = left - 1
        if low then low_left = low_left - 1 end
      end
    end
    redis.call('RPOP', KEYS[k], #texts)
    if #texts < room then break end
  end
end
return {owner, buried, taken, (buried >= 100 or bytes >= MOST_TAKEN) and 1 or 0}
"""
)

ACK = (
    _COMMON
    + r"""
-- ARGV: tag, owner, …  Returns the tags that another worker holds now.
local missed = {}
for i = 1, #ARGV, 2 do
  if redis.call('HGET', owners, ARGV[i]) == ARGV[i + 1] then forget(ARGV[i]) else missed[#missed + 1] = ARGV[i] end
end
return missed
"""
)

RENEW = (
    _COMMON
    + r"""
-- ARGV: tag, owner, … in the order of fetching; the scores keep this order.  Returns the tags whose lease is lost.
local us, lost = clock(), {}
for i = 1, #ARGV, 2 do
  local tag = ARGV[i]
  if redis.call('HGET', owners, tag) == ARGV[i + 1] and redis.call('ZSCORE', index, tag) then
    redis.call('ZADD', index, seconds(us + i), tag)
  else
    lost[#lost + 1] = tag
  end
end
return lost
"""
)

GIVE_BACK = (
    _COMMON
    + r"""
-- ARGV: tag, owner, list, delay in microseconds, deliveries before this one, 1 if the delay counts as a retry, …
-- The message given back last is fetched first. The count is set, not lowered: the consumer may have lowered it already.
-- The owner is deleted first: nothing is lost if the script ends after this, and a full server accepts it as a first write.
local us = clock()
for i = 1, #ARGV, 6 do
  local tag, list, delay = ARGV[i], ARGV[i + 2], tonumber(ARGV[i + 3])
  if redis.call('HGET', owners, tag) == ARGV[i + 1] then
    local text = text_of(redis.call('HGET', unacked, tag))
    redis.call('HDEL', owners, tag)
    if delay > 0 then
      if ARGV[i + 5] == '1' then redis.call('HSET', retries, tag, count_of(retries, tag) + 1) end
      redis.call('ZADD', delayed, seconds(us + delay), tag)
      redis.call('ZADD', index, seconds(us + delay), tag)
    else
      if text and not push(list, text) then bury('its list holds something else', list, 0, text) end
      release(tag)
    end
    local before = tonumber(ARGV[i + 4])
    if before > 0 then redis.call('HSET', deliveries, tag, before) else redis.call('HDEL', deliveries, tag) end
  end
end
"""
)

BURY = (
    _COMMON
    + r"""
-- ARGV: tag, owner, queue, reason, …
for i = 1, #ARGV, 4 do
  local tag = ARGV[i]
  if redis.call('HGET', owners, tag) == ARGV[i + 1] then
    local record = redis.call('HGET', unacked, tag)
    local count = count_of(deliveries, tag)
    bury(ARGV[i + 3], ARGV[i + 2], count, text_of(record) or record or '')
    forget(tag)
  end
end
"""
)

SWEEP = (
    _COMMON
    + r"""
-- ARGV: lease in microseconds, most messages, separator, prefix of every key, priority steps, highest number first.
-- Leases that ran out and delayed messages that are due go back to the head of their lists.
local us, found = clock(), 0

local function list_of(queue, priority)
  for i = 5, #ARGV do
    local step = tonumber(ARGV[i])
    if step > 0 and priority >= step then return ARGV[4] .. queue .. ARGV[3] .. ARGV[i] end
  end
  return ARGV[4] .. queue
end

local function put_back(tag)
  local record = redis.call('HGET', unacked, tag)
  redis.call('HDEL', owners, tag)
  if not record then return release(tag) end
  local text, readable, r = text_of(record), pcall(cjson.decode, record)
  local properties = text and readable and type(r[1]) == 'table' and r[1].properties
  if type(properties) ~= 'table' then
    bury('its lease ran out and its record cannot be read', '', 0, text or record)
    return forget(tag)
  end
  local list = list_of(r[3], tonumber(properties.priority) or 0)
  if not push(list, text) then bury('its list holds something else', r[3], 0, text) end
  release(tag)
end

for key, before in pairs({[index] = us - ARGV[1], [delayed] = us}) do
  local tags = redis.call('ZRANGE', key, '-inf', seconds(before), 'BYSCORE', 'LIMIT', 0, tonumber(ARGV[2]))
  for i = #tags, 1, -1 do put_back(tags[i]) end
  found = found + #tags
end
return found
"""
)

GATHER = (
    _COMMON
    + r"""
-- ARGV: lists.  Messages that woke a worker and were not fetched go back to their lists, and wake other workers.
for _, list in ipairs(ARGV) do gather(list) end
"""
)

REPORTED = (
    _COMMON
    + r"""
-- ARGV: entries whose letters have been reported.
for _, entry in ipairs(ARGV) do
  if redis.call('LREM', unreported, -1, entry) > 0 then redis.call('LPUSH', dead, entry) end
end
"""
)

DUE = (
    _COMMON
    + r"""
-- ARGV: tags.  Delayed messages among them are due now.
local us = clock()
for _, tag in ipairs(ARGV) do
  if redis.call('ZSCORE', delayed, tag) then redis.call('ZADD', delayed, seconds(us), tag) end
end
"""
)

UNREPORTED = (
    _COMMON
    + f"local MOST_LETTER, MOST_READ = {MOST_LETTER_BYTES}, {MOST_READ_BYTES}"
    + r"""
-- Returns the oldest unreported letters, at most a hundred or some megabytes. A letter that is too large to be read, which only
-- another program writes, is filed unreported.
local found, bytes = {}, 0
while #found < 100 and bytes < MOST_READ do
  local entry = redis.call('LRANGE', unreported, -1 - #found, -1 - #found)[1]
  if not entry then break end
  if #entry > MOST_LETTER then
    redis.call('LREM', unreported, -1, entry)
    redis.call('LPUSH', dead, entry)
  else
    found[#found + 1] = entry
    bytes = bytes + #entry
  end
end
return found
"""
)

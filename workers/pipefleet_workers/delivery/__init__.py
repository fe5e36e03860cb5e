"""delivery: Celery's messages on Redis, with leases. It stands between the lists of a queue and the consumer.

    lists of the queue ──fetch──▶ lease ──▶ consumer ──ack──▶ gone
        ▲   one script, many       │ renewed by the ledger's thread
        │                          ├─ give back, at once or after a delay ─▶ head of its list
        └── sweep ◀── ran out ─────┘
                                   └─ malformed, or delivered too often ──▶ dead letters

The life of one lease, with the keys that each event changes (names as in `leases.LeaseKeys`):

    fetch      list ─▶ unacked, owners, index (score: now); deliveries + 1
    renew      index: score = now                                              every `renew_seconds`, while the worker lives
    ack        unacked, owners, index, deliveries, retries: entry deleted
    give back  ─▶ list; with a delay ─▶ delayed until then; deliveries - 1
    ran out    the score is older than `lease_seconds`: any worker's sweep ─▶ list; deliveries stays
    bury       ─▶ unreported; after its report ─▶ dead

Celery gets `transport`. `ledger` is the thread that renews, writes acks and sweeps. `leases` holds the types, `scripts` the Lua.
`bells` and `waiting` tell an idle worker of messages; `pace` lets a busy worker take them in larger batches. `audience` knows
whether anybody hears Celery's events. `envelope` checks messages, which any program may have written.

A message that wakes an idle worker lies in `<list>:arriving` until it is fetched, within milliseconds. Every fetch and every sweep
of any worker of the queue first puts the messages there back to the head of their list.

**With other programs.** Lists, `unacked` and `unacked_index` are kombu's own: stock producers, Flower and `celery inspect` work as
ever. A stock worker may replace ours on the same queues once ours have ended. Messages that ours left leased or delayed come back
after its `visibility_timeout`; a message that woke one of ours at the moment of its death waits for another of ours. Do not run
both at once on the same `unacked` keys: a stock worker does not renew, so our sweep would take its messages after
`lease_seconds`; its sweep would take ours if they were ever older than its `visibility_timeout`; and it counts no deliveries.

**Rights.** The least that a Redis user needs for one queue Q (with keys from `pipefleet.queues.keys.ledger_keys`) is, as a worker,

    ~Q* ~pipefleet:*:Q ~_kombu.binding.* &/0.celery.pidbox &/0.celeryev/worker.* &/0.celeryev/* -@all
    +ping +client +select +eval +evalsha +time +blmove +lmove +lrange +rpop +rpush +lpush +llen +lrem +hget +hset +hdel +hincrby
    +zadd +zrem +zscore +zrange +sadd +smembers +psubscribe +punsubscribe +publish +multi +exec

Without +evalsha each call sends the text of its script. A producer that only queues messages needs

    ~Q* ~_kombu.binding.* -@all +ping +client +select +lpush +llen +sadd +smembers +multi +exec

Job records, runs and announcements need more: deploy/redis/users.acl has the roles of a fleet, with rights by key and command.
"""

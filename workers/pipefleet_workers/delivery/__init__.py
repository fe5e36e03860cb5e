"""Delivery: Celery's messages on Redis, with leases. Between a queue's lists and the consumer.

    lists of the queue ──fetch──▶ lease ──▶ consumer ──ack──▶ gone
        ▲   one script, many       │ renewed by the ledger's thread
        │                          ├─ give back, at once or after a delay ─▶ head of its list
        └── sweep ◀── ran out ─────┘
                                   └─ malformed, or delivered too often ──▶ dead letters

`transport` is what Celery is given; `ledger` is the thread that renews, writes acks and sweeps; `leases` holds the types;
`scripts` the Lua; `waiting` how an idle worker hears of messages; `envelope` the check of what anybody may have written.

A message that wakes an idle worker lies in `<list>:arriving` until it is fetched, within milliseconds; every fetch and every sweep
of any worker of the queue puts what lies there back to the head of its list first.

**With other programs.** Lists, `unacked` and `unacked_index` are kombu's own: stock producers, Flower and `celery inspect` work as
ever. A stock worker may replace ours on the same queues once ours have ended: what they left leased or delayed comes back
after its `visibility_timeout`, and what woke one of them in the instant in which it was killed waits for another of ours. Do
not run both at once on the same `unacked` keys: a stock worker does not renew, so our sweep would take its messages after
`lease_seconds`, its sweep would take ours if they were ever older than its `visibility_timeout`, and it counts no deliveries.

**Rights.** The least that a Redis user needs for one queue Q (with keys from `pipefleet.queues.keys.ledger_keys`) is, as a worker,

    ~Q* ~pipefleet:*:Q ~_kombu.binding.* &/0.celery.pidbox &/0.celeryev/worker.* &/0.celeryev/* -@all
    +ping +client +select +eval +evalsha +time +blmove +lmove +lrange +rpop +rpush +lpush +llen +lrem +hget +hset +hdel +hincrby
    +zadd +zrem +zscore +zrange +sadd +smembers +psubscribe +punsubscribe +publish +multi +exec

Without +evalsha each call sends the text of its script. A producer that only queues messages needs

    ~Q* ~_kombu.binding.* -@all +ping +client +select +lpush +llen +sadd +smembers +multi +exec

Job records, runs and announcements need more: deploy/redis/users.acl has the roles of a fleet, with rights by key and command.
"""

// Package spool is Holdfast's durable store-and-forward log: a log per lane, many readers.
//
// # The contract
//
// Append hands a message in. When its Done is called without an error the message is on stable
// storage (with durability fsync) and will end in exactly one account of every upstream that waits
// for it: delivered, expired, evicted or parked; until then it is pending.
//
// Sequences count a lane's messages 1, 2, 3 … without a hole, across restarts. A reader sees a
// message only after its fsync, in every durability mode: nothing leaves the gateway that a power
// cut could take back, so no number ever names two messages.
//
// A Reader hands out records in the order of their sequences. A lane that drains live_first has two, of the newest messages
// and of the backlog, see live.go; what follows holds for each. Resolve moves its durable cursor.
// After a crash a reader begins at the cursor as it was last committed, at most one second of
// resolved messages back: those are sent again, under the same ids.
//
// What ends otherwise than delivered is counted and announced to the upstream as a gap, a message in
// the lane "system" that is written by the same commit as the count.
//
// # How it works
//
// Messages gather in one buffer per lane. Each group commit (package kv) seals the buffers, writes
// each as one or more chunks, the lanes' ends and the moved cursors in one batch, and syncs once.
// Fresh chunks stay in a bounded tail in memory, from which readers that keep up are served; only a
// reader with a backlog reads the store.
//
// Space goes back in two ways, see reclaim.go: a chunk that is finished with while its memtable
// still takes writes is deleted there, where row and tombstone cancel out; what has reached a table
// is excised, range by range.
//
// # Locks
//
// The store's commit lock (kv.Store.Begin … Group.End) guards what gathers: a lane's next position
// and its open buffer. Spool.mu guards what is committed: durable ends, tails, cursors. Whoever
// needs both takes the commit lock first.
package spool

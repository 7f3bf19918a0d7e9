// Package bridge drains a spool upstream: at least once, in order per device and lane, and so that
// no message leaves the spool before the upstream has taken it.
//
// One [Bridge] serves one upstream:
//
//	spool reader (a lane) ─▶ stage ─▶ cut: a batch, a message, or an end without a send
//	                                   │
//	        cursor ◀─ settle ◀─ window ┴▶ Session.Send ─▶ upstream
//	                              ▲                          │
//	                              └────────── ack ◀──────────┘
//
// One goroutine, Run's, owns all of it; the upstream's acks reach it through an inbox. What to read:
// window.go is what is in flight and what may be acked, schedule.go whose turn it is, pace.go how much
// the link can carry, cut.go what becomes of records, bridge.go the life of a link, upstream.go what
// an adapter owes.
//
// A link that is lost takes everything in flight with it: the window is emptied, each reader goes
// back to its cursor, and the next link gets the same records under the same ids in the same order.
// That one way of recovery serves every fault: a reset, a stall, an upstream that takes and never
// acks, a crash of this process.
package bridge

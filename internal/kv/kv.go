// Package kv opens the one Pebble store of a gateway and owns its group commit:
// whatever any part writes joins the next batch, one synced write for many.
package kv

import (
	"errors"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
)

// Key prefixes: the first byte of every key says who owns the row.
// Written to disk: never renumber, never reuse.
const (
	PrefixMeta     = 'm' // kv: format version; spool: epoch, lane names; clock: itself, boots
	PrefixLane     = 'l' // spool: a lane's tail
	PrefixCursor   = 'u' // spool: an upstream's cursor and accounts in a lane
	PrefixData     = 'd' // spool: chunks
	PrefixParked   = 'p' // spool: messages an upstream refused for good
	PrefixQoS2     = 'q' // broker: packet ids received and not yet released
	PrefixRetained = 'r' // broker: retained messages
	PrefixSession  = 's' // broker: sessions and their subscriptions
	PrefixWill     = 'w' // broker: wills that wait for their delay
	PrefixDevice   = 'v' // devices
	PrefixCommand  = 'c' // devices: commands
	PrefixToken    = 't' // gateway: bearer tokens of the HTTP API
	PrefixUsage    = 'b' // gateway: bytes sent to an upstream on a day
	PrefixAudit    = 'a' // gateway: the last record of the audit log
)

// ErrClosed is returned by every call after Close, and handed to Done for what was
// still waiting when the store failed.
var ErrClosed = errors.New("store is closed")

// Op is one write of a row. Key and Value are copied before the call that takes the Op returns.
type Op struct {
	Key    []byte
	Value  []byte
	Delete bool // remove the row instead
}

// Done is told once how a write ended: err == nil means that it is on stable
// storage. Calls come from one goroutine, in the order in which the writes were
// handed in, so Done must be quick, must not block and must not write itself.
type Done interface {
	Done(token, seq uint64, err error)
}

// Durability says what an acknowledgement waits for.
type Durability int

// The durabilities.
const (
	Fsync    Durability = iota // Done after fsync
	Interval                   // Done after the write; fsync at most SyncInterval later
)

// Options of a store.
type Options struct {
	FS           vfs.FS // nil: the operating system's
	Durability   Durability
	SyncInterval time.Duration
	Log          *slog.Logger
	Metrics      prometheus.Registerer // nil: none
	MaxTables    int                   // that are open at once, each a descriptor; 0: 190
	Guard        *Guard                // how the disk is watched; nil: it is not
	// Look is for tools that only read: writes are taken and forgotten, and a damaged store is left as it is; what can be read of it is
	// opened as a copy beside it.
	Look bool
	// Fatal is called when a write or sync failed in a way that leaves open what the disk has. The store takes nothing
	// more and acknowledges nothing more; the process has to end and start again.
	Fatal func(error)

	fullWait time.Duration // for tests; 0: fullWait
}

// InMemory is a file system for Options.FS that keeps nothing.
func InMemory() vfs.FS { return vfs.NewMem() }

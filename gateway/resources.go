package gateway

import (
	"fmt"

	"holdfast/gateway/broker"
)

// resources say how much of what the process may use each part gets, so that none takes what another needs: connections
// leave the store the descriptors for its tables, and what waits in memory for slow clients leaves it its own.
type resources struct {
	tables      int    // descriptors for the store's tables
	http        int    // connections to the API
	connections int    // of devices
	scarce      string // what connections are fewer for than they would be: "open files", "memory"; "": nothing
}

const (
	mostConnections = 20_000 // as long as nothing is scarce
	manyConnections = 10_000 // are enough not to warn of having no more
	mostTables      = 190
	mostHTTP        = 128
	leastFiles      = 64 // below that nothing works

	// What a connected device takes at most when it is quiet: TLS, client certificate, session, command link.
	connectionBytes = 64 << 10

	mostSessions = 50_000
	sessionBytes = 16 << 10 // of one, with its share of what the collector has not taken yet and room for subscriptions
)

// share divides files (0: unknown) and memory (bytes, 0: unknown) among the parts. others is how many descriptors listeners
// and upstreams take.
func share(files int, memory int64, others int) (resources, error) {
	r := resources{tables: mostTables, http: mostHTTP, connections: mostConnections}
	if memory > 0 {
		if n := int(max(memory/connectionBytes, 256)); n < r.connections {
			r.connections, r.scarce = n, "memory"
		}
	}
	if files == 0 {
		return r, nil
	}
	r.tables = min(max(files/4, 16), mostTables)
	r.http = min(max(files/8, 8), mostHTTP)
	// Logs, manifest, lock, what is read in passing, standard streams, the runtime.
	const fixed = 24
	n := files - r.tables - r.http - fixed - others
	if files < leastFiles || n < 1 {
		return r, fmt.Errorf("this process may open %d files, too few for the store, %d connections to the API and %d listeners and upstreams: "+
			"raise the hard limit (ulimit -Hn, LimitNOFILE=) to some hundreds more than there are devices", files, r.http, others)
	}
	if n < r.connections {
		r.connections, r.scarce = n, "open files"
	}
	return r, nil
}

// bounds sets what may be held in memory for devices. 0: unknown, the broker's own bounds hold.
func bounds(c *broker.Config, memory int64) {
	if memory == 0 {
		return
	}
	part := func(of, least, most int64) int { return int(min(max(memory/of, least<<20), most<<20)) }
	c.MaxSessions = int(min(max(memory/sessionBytes, 1000), mostSessions))
	c.MaxQueuedBytes = part(8, 4, 64)
	c.MaxRetainedBytes = part(8, 4, 64)
	c.MaxFanoutBytes = part(16, 2, 16)
	c.MaxWriteBytes = part(16, 2, 64)
	c.MaxReadBytes = part(16, 2, 64)
}

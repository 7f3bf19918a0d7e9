package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/internal/kv"
)

// auditKey has the last record of the audit log that is known to be on disk: a chain alone does not tell that its end is missing.
//
//	'a' -> | version 1 | seq (8) | hash (32) |
//
// Written to disk: never renumber, never reuse.
var auditKey = []byte{kv.PrefixAudit}

const auditV1 = 1

// auditing is the audit log of a gateway that runs. It implements httpapi.Audit.
type auditing struct {
	*audit.Log
	dir      string
	store    *kv.Store
	failures prometheus.Counter
}

var _ httpapi.Audit = (*auditing)(nil)

// openAudit opens the log. With fresh, what the store knows of it is about another disk's.
func openAudit(store *kv.Store, dir string, fresh bool, o audit.Options) (*auditing, error) {
	a := &auditing{dir: dir, store: store, failures: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "holdfast_gateway_audit_failures_total",
		Help: "Acts that are not in the audit log because it could not be written. Rising: see the log, and the disk.",
	})}
	if !fresh {
		var err error
		if o.Known, err = auditHead(store); err != nil {
			return nil, err
		}
	}
	log, err := audit.Open(dir, o)
	if err != nil {
		return nil, err
	}
	a.Log = log
	return a, nil
}

func auditHead(store *kv.Store) (h audit.Head, err error) {
	v, found, err := store.Get(auditKey)
	if err != nil || !found || len(v) != 1+8+len(h.Hash) || v[0] != auditV1 {
		return audit.Head{}, err // a newer version's row says nothing here
	}
	h.Seq = binary.BigEndian.Uint64(v[1:])
	copy(h.Hash[:], v[9:])
	return h, nil
}

// Record implements httpapi.Audit.
func (a *auditing) Record(e audit.Entry) error {
	h, err := a.Append(e)
	if err != nil {
		a.failures.Inc()
		return err
	}
	v := binary.BigEndian.AppendUint64([]byte{auditV1}, h.Seq)
	// It goes along with the next commit: behind the log it may be, never before it. A store that takes nothing more is the end anyway.
	_ = a.store.Apply([]kv.Op{{Key: auditKey, Value: append(v, h.Hash[:]...)}}, nil, 0)
	return nil
}

// List implements httpapi.Audit.
func (a *auditing) List(f audit.Filter) ([]audit.Entry, uint64, error) { return audit.List(a.dir, f) }

// CommandLine is who a program on this machine is, for the audit log.
func CommandLine() string {
	id := os.Getuid()
	who := "command line, user " + strconv.Itoa(id)
	if u, err := user.LookupId(strconv.Itoa(id)); err == nil {
		who += " " + u.Username
	}
	return who
}

// record notes what the gateway itself, or its process, did. Where that cannot be written only the log tells.
func (g *Gateway) record(e audit.Entry) {
	if err := g.audit.Record(e); err != nil {
		g.log.Error("act is not in the audit log", "who", e.Who, "what", e.Act, "object", e.Object, "result", e.Result, "err", err)
	}
}

// recordStart notes the start, and whether the run before was stopped.
func (g *Gateway) recordStart(context.Context) error {
	detail := fmt.Sprintf("version %s, process %d", g.version, os.Getpid())
	last := func(act string) (seq uint64) {
		page, _, err := g.audit.List(audit.Filter{Act: act, Limit: 1})
		if err != nil || len(page) == 0 {
			return 0
		}
		return page[0].Seq
	}
	if last(audit.Start) > last(audit.Stop) {
		detail += "; the run before was not stopped: it was killed, it failed, or the power went"
	}
	g.record(audit.Entry{Who: CommandLine(), Act: audit.Start, Object: g.cfg.Gateway.ID, Result: audit.Done, Detail: detail})
	return nil
}

// recordStop notes why the gateway stopped.
func (g *Gateway) recordStop(ctx context.Context, err error) {
	e := audit.Entry{Who: itself, Act: audit.Stop, Object: g.cfg.Gateway.ID, Result: audit.Done}
	switch cause := context.Cause(ctx); {
	case err != nil:
		e.Result, e.Detail = audit.Failed, err.Error()
	case cause != nil && !errors.Is(cause, context.Canceled):
		e.Who = cause.Error()
	}
	g.record(e)
}

// itself is who acts when nobody else does.
const itself = "gateway"

// AuditHead tells the last record of the audit log that a gateway which is not running knows of.
func AuditHead(path string, log *slog.Logger) (h audit.Head, err error) {
	dir, store, sp, err := openForTools(path, "", false, log)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, sp.Close(), store.Close(), dir.Close()) }()
	return auditHead(store)
}

// Package httpapi is the operators' door: is the gateway alive, is it ready, what is it doing; which devices may come, what
// are they to do; what happens now. It asks the parts and keeps nothing itself but the last events.
//
// One table (route.go) says what may be asked, who may ask it, and what the API's own description in OpenAPI says of it.
package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"holdfast/spool"
)

// Bounds of what a caller may cost.
const (
	maxConnections = 128 // default of Config.MaxConnections; among them maxStreams and maxWaiters that stay
	maxHeader      = 16 << 10
	maxBody        = 64 << 10 // but of a command, see wire.MaxSubmit
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
)

// Config of a Server.
type Config struct {
	Address string // host:port
	Gateway string // the first part of every message id
	// MaxConnections are open at once, others wait; 0: 128.
	MaxConnections int
}

// Server serves the API. Make it with New, then Listen, then Run once.
type Server struct {
	cfg     Config
	p       Parts
	log     *slog.Logger
	metrics http.Handler
	m       *metrics
	doc     *document
	handler http.Handler
	ln      net.Listener

	ui       *dashboard
	wrong    attempts
	sessions sessions
	streams  chan struct{} // cap: how many may be open
	waiters  chan struct{} // cap: how many may wait for a command
	exports  chan struct{} // cap: how many may be under way
	stopping chan struct{} // closed when Run is asked to stop
	stop     sync.Once     // closes it
}

// New makes a server of what the parts show and do.
func New(cfg Config, p Parts) *Server {
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = maxConnections
	}
	s := &Server{
		cfg: cfg, p: p, log: p.Log, m: newMetrics(p.Metrics), doc: describe(table),
		metrics: promhttp.HandlerFor(p.Gatherer, promhttp.HandlerOpts{
			ErrorHandling:       promhttp.ContinueOnError,
			MaxRequestsInFlight: 2,
			Timeout:             writeTimeout / 2,
			DisableCompression:  true, // loopback: not worth the memory
		}),
		streams:  make(chan struct{}, maxStreams),
		waiters:  make(chan struct{}, maxWaiters),
		exports:  make(chan struct{}, maxExports),
		stopping: make(chan struct{}),
		sessions: sessions{tokens: p.Tokens},
	}
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for i := range table {
		row := &table[i]
		mux.Handle(row.name(), s.serve(row)) // GET is HEAD, too
		methods[row.path] = append(methods[row.path], row.method)
		if row.method == http.MethodGet {
			methods[row.path] = append(methods[row.path], http.MethodHead)
		}
	}
	for path, allowed := range methods {
		slices.Sort(allowed)
		mux.Handle(path, s.serve(&route{path: path, h: func(_ *Server, c *call) error {
			c.w.Header().Set("Allow", strings.Join(allowed, ", "))
			return failf(codeMethod, "%s takes %s, not %.20s", path, strings.Join(allowed, ", "), c.r.Method)
		}}))
	}
	s.handleUI(mux)
	mux.Handle("/", s.serve(&route{path: "other", h: func(*Server, *call) error {
		return failf(codeNotFound, "there is nothing here: /api/v1/openapi.json says what there is; try /api/v1/status, /metrics, /healthz or /readyz")
	}}))
	s.handler = mux
	return s
}

// Handler is the whole API.
func (s *Server) Handler() http.Handler { return s.handler }

// Listen binds the address.
func (s *Server) Listen(ctx context.Context) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", s.cfg.Address)
	if err != nil {
		return fmt.Errorf("http.address %s: %w", s.cfg.Address, err)
	}
	s.ln = ln
	return nil
}

// Addr is the address that is bound, nil before Listen.
func (s *Server) Addr() net.Addr {
	if s.ln == nil {
		return nil
	}
	return s.ln.Addr()
}

// Close gives the address back if Run was never called. Twice is no harm.
func (s *Server) Close() error {
	if s.ln == nil {
		return nil
	}
	if err := s.ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Run serves until ctx ends, then ends the streams at once and lets other requests that are under way end.
func (s *Server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // what a peer did wrong
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(netutil.LimitListener(s.ln, s.cfg.MaxConnections)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve http on %s: %w", s.cfg.Address, err)
	case <-ctx.Done():
	}
	s.stop.Do(func() { close(s.stopping) })
	// Requests are answered from memory or wait for one commit: one that needs longer than this has a peer that does not read.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 500*time.Millisecond)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		_ = srv.Close() // cut who is still there
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("serve http on %s: %w", s.cfg.Address, err)
	}
	return nil
}

func (s *Server) health(c *call) error { return c.reply(http.StatusOK, Health{"alive"}) }

func (s *Server) ready(c *call) error {
	if err := s.p.Source.Ready(); err != nil {
		return failf(codeNotReady, "%v", err)
	}
	return c.reply(http.StatusOK, Health{"ready"})
}

func (s *Server) showMetrics(c *call) error {
	s.metrics.ServeHTTP(c.w, c.r)
	return nil
}

// status answers with no list null.
func (s *Server) status(c *call) error {
	st := s.p.Source.Status()
	if st.Broker.Listeners == nil {
		st.Broker.Listeners = []Listener{}
	}
	if st.Lanes == nil {
		st.Lanes = []spool.LaneStat{}
	}
	if st.Upstreams == nil {
		st.Upstreams = []Upstream{}
	}
	if st.Ledger.Accounts == nil {
		st.Ledger.Accounts = []spool.Account{}
	}
	if st.Alarms == nil {
		st.Alarms = []Alarm{}
	}
	if st.Certificates == nil {
		st.Certificates = []Certificate{}
	}
	return c.reply(http.StatusOK, st)
}

func (s *Server) openAPI(c *call) error {
	h := c.w.Header()
	h.Set("ETag", s.doc.etag)
	h.Set("Cache-Control", "no-cache") // keep it, but ask
	for tag := range strings.SplitSeq(c.r.Header.Get("If-None-Match"), ",") {
		if tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/"); tag == s.doc.etag || tag == "*" {
			c.w.WriteHeader(http.StatusNotModified)
			return nil
		}
	}
	h.Set("Content-Type", "application/json")
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(s.doc.json)
	return nil
}

// Package httpapi is the operators' door: is it alive, is it ready, what is it doing. It asks the
// gateway and changes nothing yet.
package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Bounds of what a caller may cost.
const (
	maxConnections = 64
	maxHeader      = 16 << 10
	maxBody        = 64 << 10
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
)

// Config of a Server.
type Config struct {
	Address string // host:port
	// Gateway and Epoch are the first parts of every message id.
	Gateway, Epoch string
}

// Server serves the API. Make it with New, then Listen, then Run once.
type Server struct {
	cfg     Config
	p       Parts
	log     *slog.Logger
	metrics http.Handler
	m       *metrics
	handler http.Handler
	ln      net.Listener
}

// access says who may call.
type access int

const (
	// open: everybody. Nothing of it tells more than that a gateway is here.
	open access = iota
	// viewer: whoever may look at everything. Until there are tokens that is this machine.
	viewer
)

// New makes a server of what the parts show and do.
func New(cfg Config, p Parts) *Server {
	s := &Server{
		cfg: cfg, p: p, log: p.Log, m: newMetrics(p.Metrics),
		metrics: promhttp.HandlerFor(p.Gatherer, promhttp.HandlerOpts{
			ErrorHandling:       promhttp.ContinueOnError,
			MaxRequestsInFlight: 2,
			Timeout:             writeTimeout / 2,
			DisableCompression:  true, // loopback: not worth the memory
		}),
	}
	table := []struct {
		path   string
		access access
		get    http.HandlerFunc
	}{
		{"/healthz", open, s.health},
		{"/readyz", open, s.ready},
		{"/metrics", viewer, s.metrics.ServeHTTP},
		{"/api/v1/status", viewer, s.status},
	}
	mux := http.NewServeMux()
	for _, row := range table {
		mux.Handle("GET "+row.path, s.guard(row.path, row.access, row.get))
		mux.Handle(row.path, s.guard(row.path, open, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Allow", "GET, HEAD")
			fail(w, http.StatusMethodNotAllowed, "method_not_allowed", fmt.Sprintf("%s takes GET", row.path))
		}))
	}
	mux.Handle("/", s.guard("other", open, func(w http.ResponseWriter, _ *http.Request) {
		fail(w, http.StatusNotFound, "not_found", "there is nothing here: try /api/v1/status, /metrics, /healthz or /readyz")
	}))
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

// Run serves until ctx ends, then lets requests that are under way end.
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
	go func() { served <- srv.Serve(netutil.LimitListener(s.ln, maxConnections)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve http on %s: %w", s.cfg.Address, err)
	case <-ctx.Done():
	}
	// Requests are answered from memory: one that needs longer than this has a peer that does not read.
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

func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, map[string]string{"status": "alive"})
}

func (s *Server) ready(w http.ResponseWriter, _ *http.Request) {
	if err := s.p.Source.Ready(); err != nil {
		fail(w, http.StatusServiceUnavailable, "not_ready", err.Error())
		return
	}
	reply(w, http.StatusOK, map[string]string{"status": "ready"})
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, s.p.Source.Status())
}

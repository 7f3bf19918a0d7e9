package httpapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type source struct{ err error }

func (s source) Ready() error { return s.err }

func (s source) Status() httpapi.Status {
	return httpapi.Status{Version: "1", Gateway: "gw", Ledger: httpapi.NewLedger([]spool.Account{{
		Lane: "telemetry", Accepted: spool.Count{Messages: 3, Bytes: 30}, Pending: spool.Count{Messages: 3, Bytes: 30},
	}})}
}

func server(t *testing.T, src httpapi.Source) *httpapi.Server {
	t.Helper()
	reg := prometheus.NewRegistry()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	return httpapi.New(httpapi.Config{Address: "127.0.0.1:0"}, httpapi.Parts{Source: src, Gatherer: reg, Log: log, Metrics: reg})
}

// ask sends a request as from peer; change may alter it.
func ask(t *testing.T, s *httpapi.Server, method, target, peer string, change func(*http.Request)) *http.Response {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:8080"+target, nil)
	r.RemoteAddr = peer
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	return w.Result()
}

func code(t *testing.T, resp *http.Response) string {
	t.Helper()
	var e httpapi.Error
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &e); err != nil || e.Error.Message == "" {
		t.Fatalf("answer is no error in JSON: %v: %s", err, b)
	}
	return e.Error.Code
}

const local, remote = "127.0.0.1:40000", "192.0.2.7:40000"

func TestWhoMayAsk(t *testing.T) {
	s := server(t, source{})
	header := func(k, v string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(k, v) }
	}
	host := func(h string) func(*http.Request) { return func(r *http.Request) { r.Host = h } }
	for name, tc := range map[string]struct {
		target, peer string
		change       func(*http.Request)
		want         int
		code         string
	}{
		"alive, from anywhere":            {"/healthz", remote, host("gw.example.com"), 200, ""},
		"ready, from anywhere":            {"/readyz", remote, nil, 200, ""},
		"status, here":                    {"/api/v1/status", local, nil, 200, ""},
		"status, here by name":            {"/api/v1/status", local, host("LocalHost:8080"), 200, ""},
		"status, here on IPv6":            {"/api/v1/status", "[::1]:1", host("[::1]:8080"), 200, ""},
		"status, mapped address":          {"/api/v1/status", "[::ffff:127.0.0.1]:1", nil, 200, ""},
		"status, other machine":           {"/api/v1/status", remote, nil, 403, "forbidden"},
		"metrics, here":                   {"/metrics", local, nil, 200, ""},
		"metrics, other machine":          {"/metrics", remote, nil, 403, "forbidden"},
		"status, by a page's own name":    {"/api/v1/status", local, host("evil.example.com"), 403, "host_not_allowed"},
		"status, looks like the address":  {"/api/v1/status", local, host("127.0.0.1.evil.example.com"), 403, "host_not_allowed"},
		"status, no name":                 {"/api/v1/status", local, host(""), 403, "host_not_allowed"},
		"status, handed on by a proxy":    {"/api/v1/status", local, header("X-Forwarded-For", "192.0.2.7"), 403, "forbidden"},
		"status, handed on by a proxy, 2": {"/api/v1/status", local, header("Forwarded", "for=192.0.2.7"), 403, "forbidden"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := ask(t, s, "GET", tc.target, tc.peer, tc.change)
			defer resp.Body.Close()
			if resp.StatusCode != tc.want {
				t.Fatalf("status = %d, want %d", resp.StatusCode, tc.want)
			}
			if tc.code != "" {
				if got := code(t, resp); got != tc.code {
					t.Errorf("code = %q, want %q", got, tc.code)
				}
			}
		})
	}
}

func TestNotReady(t *testing.T) {
	resp := ask(t, server(t, source{errors.New("listeners are not bound yet")}), "GET", "/readyz", local, nil)
	defer resp.Body.Close()
	if resp.StatusCode != 503 || code(t, resp) != "not_ready" {
		t.Errorf("status = %d", resp.StatusCode)
	}
}

func TestErrorsAreJSON(t *testing.T) {
	s := server(t, source{})
	for _, tc := range []struct {
		method, target string
		want           int
		code           string
	}{
		{"GET", "/", 404, "not_found"},
		{"POST", "/api/v1/nothing", 404, "not_found"},
		{"POST", "/api/v1/status", 405, "method_not_allowed"},
		{"DELETE", "/healthz", 405, "method_not_allowed"},
	} {
		resp := ask(t, s, tc.method, tc.target, local, nil)
		if got := code(t, resp); resp.StatusCode != tc.want || got != tc.code {
			t.Errorf("%s %s = %d %s, want %d %s", tc.method, tc.target, resp.StatusCode, got, tc.want, tc.code)
		}
		if ct := resp.Header.Get("Content-Type"); ct != "application/json" {
			t.Errorf("%s %s: content type %q", tc.method, tc.target, ct)
		}
		resp.Body.Close()
	}
}

func TestStatusIsReadBack(t *testing.T) {
	resp := ask(t, server(t, source{}), "GET", "/api/v1/status", local, nil)
	defer resp.Body.Close()
	var st httpapi.Status
	if err := json.NewDecoder(resp.Body).Decode(&st); err != nil {
		t.Fatal(err)
	}
	if st.Gateway != "gw" || !st.Ledger.Balanced || len(st.Ledger.Accounts) != 1 {
		t.Errorf("status = %+v", st)
	}
}

func TestALedgerThatDoesNotBalanceSaysSo(t *testing.T) {
	l := httpapi.NewLedger([]spool.Account{{Accepted: spool.Count{Messages: 3, Bytes: 30}, Pending: spool.Count{Messages: 3, Bytes: 29}}})
	if l.Balanced {
		t.Error("one byte is missing, and the ledger is balanced")
	}
}

func TestMetricsCountRequests(t *testing.T) {
	s := server(t, source{})
	resp := ask(t, s, "GET", "/api/v1/status", remote, nil)
	resp.Body.Close()
	resp = ask(t, s, "GET", "/metrics", local, nil)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if want := `holdfast_httpapi_requests_total{code="403",route="/api/v1/status"} 1`; !strings.Contains(string(b), want) {
		t.Errorf("metrics lack %s:\n%s", want, b)
	}
}

func TestRunServesAndStops(t *testing.T) {
	s := server(t, source{})
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.Addr().String()+"/api/v1/status", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("status = %d", resp.StatusCode)
	}

	// A peer that sends nothing does not hold the stop up.
	silent, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Run = %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run does not end")
	}
}

func TestAnAddressInUseIsNamed(t *testing.T) {
	a := server(t, source{})
	if err := a.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	reg := prometheus.NewRegistry()
	b := httpapi.New(httpapi.Config{Address: a.Addr().String()}, httpapi.Parts{Source: source{}, Gatherer: reg, Log: slog.New(slog.DiscardHandler), Metrics: reg})
	err := b.Listen(t.Context())
	if err == nil || !strings.Contains(err.Error(), "http.address "+a.Addr().String()) {
		t.Errorf("Listen = %v", err)
	}
}

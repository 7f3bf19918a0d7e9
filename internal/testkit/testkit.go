// Package testkit is what the tests and the benchmark of the module share: a proxy that breaks TCP links in
// every way that was seen in the field, programs that are started, killed and watched, a mosquitto to compare
// with, waiting without sleeping, and loggers that write into the test's output.
//
// Everything that starts something takes a T, ends it in Cleanup, and shows what it knows if the test failed.
package testkit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// T is what testkit needs of a testing.TB. The benchmark, which is no test, brings its own.
type T interface {
	Helper()
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Failed() bool
	Cleanup(f func())
	TempDir() string
}

// Logger returns a logger whose lines appear in t's output, from debug on.
func Logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Golden compares a file of the tree with what it should hold, or writes it if update is set. remedy is the command that does that.
func Golden(t testing.TB, path string, want []byte, update bool, remedy string) {
	t.Helper()
	if update {
		if err := os.WriteFile(path, want, 0o644); err != nil { //nolint:gosec // a page for everybody to read
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: run %q", err, remedy)
	}
	if diff := cmp.Diff(strings.Split(string(have), "\n"), strings.Split(string(want), "\n")); diff != "" {
		t.Errorf("%s is not what the code says: run %q and look at what changes (-is, +should be):\n%s", path, remedy, diff)
	}
}

// Eventually waits until cond holds and fails t if it does not within the time given. what completes the
// sentence "… did not happen".
func Eventually(t T, within time.Duration, what string, cond func() bool) {
	t.Helper()
	EventuallyNil(t, within, what, func() error {
		if !cond() {
			return errNotYet
		}
		return nil
	})
}

var errNotYet = errors.New("not yet")

// EventuallyNil is Eventually for a check that can say what is still missing: the last error is shown.
func EventuallyNil(t T, within time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		switch {
		case err == nil:
			return
		case time.Now().After(deadline) && errors.Is(err, errNotYet):
			t.Fatalf("%s: did not happen within %v", what, within)
		case time.Now().After(deadline):
			t.Fatalf("%s: did not happen within %v: %v", what, within, err)
		}
		<-tick.C
	}
}

// FreeAddr returns a loopback address with a port that nobody listens on: for a program that must find the
// same port again after each restart. No two calls in a process return the same. The port is none of those that the
// kernel hands out by itself (32768 and up, net.ipv4.ip_local_port_range): of them one that is free now, or
// while its program is down, is soon the near end of somebody's connection, and cannot be listened on.
// Where a program can listen on port 0 and say which it got, do that.
func FreeAddr(t T) string {
	t.Helper()
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(lastPort-firstPort))
		if _, taken := givenAddrs.LoadOrStore(addr, true); taken {
			continue
		}
		if ln, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", addr); err == nil {
			ln.Close()
			return addr
		}
	}
	t.Fatalf("find a free port: none of 1,000 between %d and %d is", firstPort, lastPort)
	return ""
}

const firstPort, lastPort = 10_000, 32_000

var givenAddrs sync.Map // by FreeAddr

// Dial opens a TCP connection and fails t if it cannot within five seconds.
func Dial(t T, addr string) net.Conn {
	t.Helper()
	conn, err := dial(context.Background(), addr)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func dial(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return conn, nil
}

package gateway_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// call asks the API of a gateway as its administrator.
func call(t *testing.T, g *gateway.Gateway, dir, method, path, body string) (status int, answer string) {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(dir, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+g.HTTPAddr().String()+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// Whoever is told of a step looks at the command and must see that step: one that waits for the end looks once only.
func TestEventsDoNotRunAheadOfTheCommand(t *testing.T) {
	dir := t.TempDir()
	g, err := gateway.New(t.Context(), gateway.Options{Config: configuration(t, dir), Version: "test", Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	type step struct{ told, shown string }
	steps := make(chan step, 16)
	gateway.Watch(g, func(e devices.Event, get func(string) (devices.Command, error)) {
		if e.Command == nil {
			return
		}
		s := step{told: e.Command.State.String()}
		if c, err := get(e.Command.ID); err != nil {
			s.shown = err.Error()
		} else {
			s.shown = c.State.String()
		}
		steps <- s
	})
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	testkit.EventuallyNil(t, 10*time.Second, "the gateway to be ready", g.Ready)
	if status, body := call(t, g, dir, "POST", "/api/v1/devices", `{"id":"pump-1"}`); status != 201 {
		t.Fatalf("%d: %s", status, body)
	}
	if status, body := call(t, g, dir, "POST", "/api/v1/devices/pump-1/commands", `{"id":"c1","name":"stop"}`); status != 201 {
		t.Fatalf("%d: %s", status, body)
	}
	if status, body := call(t, g, dir, "DELETE", "/api/v1/commands/c1", ""); status != 200 {
		t.Fatalf("%d: %s", status, body)
	}
	for _, want := range []string{"QUEUED", "CANCELED"} {
		if s := <-steps; s.told != want || s.shown != want {
			t.Errorf("told %s, and the command is %s", s.told, s.shown)
		}
	}
}

// What a power cut leaves has a row and what the cloud is told of it, or neither: a step that is told and was not taken, or taken and
// never told, would have two ledgers disagree for ever.
func TestRowsAndEventsAreOneCommit(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	open := func(fs vfs.FS) (*kv.Store, *spool.Spool) {
		t.Helper()
		store, err := kv.Open("store", kv.Options{FS: fs, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		sp, err := spool.Open(store, spool.Config{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		return store, sp
	}
	closeBoth := func(store *kv.Store, sp *spool.Spool) {
		t.Helper()
		if err := errors.Join(sp.Close(), store.Close()); err != nil {
			t.Fatal(err)
		}
	}
	key := func(id string) []byte { return append([]byte{kv.PrefixCommand, 0xff}, id...) }
	torn := 0 // cuts that left a part
	for range 40 {
		const commits = 300
		fs := vfs.NewCrashableMem()
		store, sp := open(fs)
		journal := gateway.NewJournal(sp, "gw")
		var durable sync.Map
		var after atomic.Int64
		after.Store(int64(1 + rng.IntN(commits)))
		cut := make(chan struct{})
		left := make(chan *vfs.MemFS)
		cfg := vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rand.New(rand.NewPCG(seed, rng.Uint64()))}
		var before []string
		go func() {
			<-cut
			durable.Range(func(id, _ any) bool { before = append(before, id.(string)); return true })
			left <- fs.CrashClone(cfg)
		}()
		var all sync.WaitGroup
		for i := range commits {
			id := fmt.Sprint("c-", i)
			c := devices.Command{ID: id, Device: "pump-1", Name: "stop", State: devices.Queued}
			all.Add(1)
			err := journal.Commit([]kv.Op{{Key: key(id), Value: []byte{1}}}, []devices.Event{{Command: &c, Upstream: true}}, func(err error) {
				defer all.Done()
				if err != nil {
					t.Error(err)
					return
				}
				durable.Store(id, true)
				if after.Add(-1) == 0 {
					close(cut)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		fs = <-left
		all.Wait()
		closeBoth(store, sp)

		store, sp = open(fs)
		told := map[string]bool{}
		if err := sp.Peek(spool.SystemLane, 0, 2*commits, func(_ uint64, r *spool.Record) error {
			e, err := wire.DecodeCommandEvent(r.Payload)
			told[e.ID] = err == nil
			return err
		}); err != nil {
			t.Fatal(err)
		}
		for i := range commits {
			id := fmt.Sprint("c-", i)
			if _, row, err := store.Get(key(id)); err != nil || row != told[id] {
				t.Errorf("%s: row %v, told %v (%v)", id, row, told[id], err)
			}
		}
		for _, id := range before {
			if !told[id] {
				t.Errorf("%s was durable and is lost", id)
			}
		}
		if n := len(told); n > 0 && n < commits {
			torn++
		}
		closeBoth(store, sp)
	}
	if torn < 5 {
		t.Errorf("only %d cuts were in the middle: the test shows little", torn)
	}
}

package gateway

import (
	"log/slog"
	"testing"

	"holdfast/bridge"
	"holdfast/internal/kv"
)

func TestUsageIsKept(t *testing.T) {
	dir := t.TempDir()
	open := func() *kv.Store {
		s, err := kv.Open(dir, kv.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	want := map[string]bridge.Usage{"cloud": {Day: 20_577, Bytes: 1<<40 + 7}, "lab/2": {Day: 1, Bytes: 0}}
	s := open()
	for name := range want {
		if u, err := (usage{s, name}).Load(); u != (bridge.Usage{}) || err != nil {
			t.Errorf("%s before anything was sent: %+v, %v", name, u, err)
		}
	}
	for name, u := range want {
		if err := (usage{s, name}).Save(u); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	for name, u := range want {
		if got, err := (usage{s, name}).Load(); got != u || err != nil {
			t.Errorf("%s after a restart: %+v, %v", name, got, err)
		}
	}
	for _, b := range [][]byte{nil, {2, 1, 1}, {1}, {1, 0x80}, {1, 7}, {1, 7, 0x80}, {1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1}} {
		if u, err := parseUsage(b); err == nil {
			t.Errorf("row %x reads as %+v", b, u)
		}
	}
}

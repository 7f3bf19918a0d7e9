package logs_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/logs"
)

func logger(s *logs.Switch) (*slog.Logger, *bytes.Buffer) {
	var out bytes.Buffer
	drop := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(s.Handler(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: drop}))), &out
}

func TestLevelChanges(t *testing.T) {
	s := logs.New(slog.LevelInfo)
	log, out := logger(s)
	log.Debug("one")
	log.Info("two")
	s.SetLevel(slog.LevelDebug)
	log.With("part", "x").Debug("three")
	s.SetLevel(slog.LevelError)
	log.WithGroup("g").Warn("four")
	if got, want := out.String(), "level=INFO msg=two\nlevel=DEBUG msg=three part=x\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for _, name := range []string{"debug", "info", "warn", "error"} {
		if l, ok := logs.ParseLevel(name); !ok || logs.LevelName(l) != name {
			t.Errorf("%s is %v", name, l)
		}
	}
}

func TestWatchedDeviceIsLoggedUntilItsTimeIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := logs.New(slog.LevelWarn)
		log, out := logger(s)
		over := make(chan string, 10)
		s.OnEnd(func(device string) { over <- device })
		say := func() string {
			out.Reset()
			log.Debug("line", "device", "pump-7")
			log.Debug("line", "client", "pump-7", "x", 1)
			log.With("device", "pump-7").Info("line")
			log.Debug("line", "device", "pump-8")
			log.Debug("line")
			log.WithGroup("g").Debug("line", "device", "pump-7") // not the line's own
			return out.String()
		}
		if got := say(); got != "" {
			t.Errorf("nobody is watched: %s", got)
		}
		until, err := s.Watch("pump-7", 10*time.Minute)
		if err != nil || time.Until(until) != 10*time.Minute || !s.Until("pump-7").Equal(until) {
			t.Errorf("Watch = %v, %v", until, err)
		}
		if got := say(); strings.Count(got, "\n") != 3 || strings.Contains(got, "pump-8") {
			t.Errorf("watched: %s", got)
		}
		time.Sleep(9 * time.Minute)                                  //nolint:forbidigo // in a bubble
		if _, err := s.Watch("pump-7", 10*time.Minute); err != nil { // longer
			t.Error(err)
		}
		time.Sleep(9 * time.Minute) //nolint:forbidigo // in a bubble
		if say() == "" || len(over) > 0 {
			t.Error("ended early")
		}
		time.Sleep(time.Minute) //nolint:forbidigo // in a bubble
		synctest.Wait()
		if got := say(); got != "" || len(over) != 1 || <-over != "pump-7" {
			t.Errorf("after its time: %s", got)
		}
		if s.Watches("pump-7") || !s.Until("pump-7").IsZero() {
			t.Error("it is watched for ever")
		}
	})
}

func TestWatchHasBounds(t *testing.T) {
	s := logs.New(slog.LevelInfo)
	defer s.Close()
	if _, err := s.Watch("a", 25*time.Hour); !errors.Is(err, logs.ErrTooLong) {
		t.Errorf("a day and more: %v", err)
	}
	for i := range 100 {
		if _, err := s.Watch(fmt.Sprint(i), time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Watch("one more", time.Hour); !errors.Is(err, logs.ErrTooMany) {
		t.Errorf("one more: %v", err)
	}
	if _, err := s.Watch("7", 0); err != nil || s.Watches("7") {
		t.Errorf("ended by hand: %v", err)
	}
	if _, err := s.Watch("one more", time.Hour); err != nil {
		t.Errorf("where there is room: %v", err)
	}
}

func BenchmarkWatchesNobody(b *testing.B) {
	s := logs.New(slog.LevelInfo)
	for b.Loop() {
		if s.Watches("pump-7") {
			b.Fatal("it is not")
		}
	}
}

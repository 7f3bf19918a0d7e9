package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// env stands in for a testing.TB: what testkit starts ends with the round that started it.
// One goroutine at a time.
type env struct {
	dir      string // temporary folders are made here
	cleanups []func()
	failed   bool
	made     int
}

// abort is what Fatalf and Skipf panic with; round turns it into an error.
type abort struct{ reason string }

func (e *env) Helper()                         {}
func (e *env) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
func (e *env) Failed() bool                    { return e.failed }
func (e *env) Cleanup(f func())                { e.cleanups = append(e.cleanups, f) }

func (e *env) Fatalf(format string, args ...any) {
	e.failed = true
	panic(abort{fmt.Sprintf(format, args...)})
}

func (e *env) Skipf(format string, args ...any) { panic(abort{fmt.Sprintf(format, args...)}) }

func (e *env) TempDir() string {
	e.made++
	dir := filepath.Join(e.dir, fmt.Sprint(e.made))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		e.Fatalf("make a temporary folder: %v", err)
	}
	return dir
}

// round runs f in a fresh env below dir and ends whatever it started, also when it failed.
func round(dir string, f func(e *env)) (err error) {
	tmp, err := os.MkdirTemp(dir, "round-")
	if err != nil {
		return err
	}
	e := &env{dir: tmp}
	defer func() {
		switch a := recover().(type) {
		case nil:
		case abort:
			err = fmt.Errorf("%s", a.reason)
		default:
			e.failed = true
			e.end()
			panic(a)
		}
		e.end()
	}()
	f(e)
	return nil
}

func (e *env) end() {
	for i := len(e.cleanups) - 1; i >= 0; i-- {
		e.cleanups[i]()
	}
	e.cleanups = nil
	_ = os.RemoveAll(e.dir) // what is left over lies in the system's temporary folder
}

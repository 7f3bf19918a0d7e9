package main

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestMemoryGoesBackOnceAfterABusyTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var allocated atomic.Uint64
		allocated.Store(1 << 20)
		freed := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			trim(ctx, allocated.Load, func() { freed++ })
		}()
		for _, step := range []struct {
			what  string
			alloc uint64
			want  int
		}{
			{"a start", 2 << 20, 0},
			{"idle", 1000, 0},
			{"busy", 100 << 20, 0},
			{"busy still", 100 << 20, 0},
			{"quiet", 1000, 1},
			{"quiet still", 1000, 1},
			{"a little", 3 << 20, 1},
			{"quiet", 0, 1},
			{"busy again", 50 << 20, 1},
			{"quiet again", 0, 2},
		} {
			allocated.Add(step.alloc)
			time.Sleep(trimEvery) //nolint:forbidigo // synctest's clock
			synctest.Wait()
			if freed != step.want {
				t.Errorf("%s: freed %d times, want %d", step.what, freed, step.want)
			}
		}
		cancel()
		<-done
	})
}

func TestAvailableMemory(t *testing.T) {
	const meminfo = "MemTotal:        2048000 kB\nMemFree:         1 kB\n"
	for name, tc := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"nothing known": {nil, 0},
		"machine":       {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n"}, 2048000 << 10},
		"no limit": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/h.service/memory.max": "max\n",
		}, 2048000 << 10},
		"own limit": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/h.service/memory.max": "67108864\n",
		}, 64 << 20},
		"limit above": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/memory.max": "67108864\n", "sys/fs/cgroup/system.slice/h.service/memory.max": "max\n",
		}, 64 << 20},
		"container, version 1": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "7:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "33554432\n",
		}, 32 << 20},
		"limit larger than the machine": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "7:memory:/x\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
		}, 2048000 << 10},
		"rubbish": {map[string]string{"proc/meminfo": "MemTotal: many kB\n", "proc/self/cgroup": "::::\nx\n"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range tc.files {
				path := filepath.Join(root, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := availableMemory(root); got != tc.want {
				t.Errorf("available = %d, want %d", got, tc.want)
			}
		})
	}
}

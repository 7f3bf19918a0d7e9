package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAvailableMemory(t *testing.T) {
	const meminfo = "MemTotal:        2048000 kB\nMemFree:         1 kB\n"
	for name, tc := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"nothing known": {nil, 0},
		"machine":       {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n"}, 2048000 << 10},
		"no limit": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/h.service/memory.max": "max\n"}, 2048000 << 10},
		"own limit": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/h.service/memory.max": "67108864\n"}, 64 << 20},
		"limit above": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/h.service\n",
			"sys/fs/cgroup/system.slice/memory.max": "67108864\n", "sys/fs/cgroup/system.slice/h.service/memory.max": "max\n"}, 64 << 20},
		"container, version 1": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "7:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "33554432\n"}, 32 << 20},
		"limit larger than the machine": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "7:memory:/x\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, 2048000 << 10},
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

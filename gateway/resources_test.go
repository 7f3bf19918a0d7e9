package gateway_test

import (
	"testing"

	"holdfast/gateway"
)

type resources struct {
	tables, http, connections int
	scarce                    string
}

func TestShare(t *testing.T) {
	for _, x := range []struct {
		files  int
		memory int64
		want   resources // connections -1: refused
	}{
		{0, 0, resources{190, 128, 20_000, ""}},
		{65_536, 8 << 30, resources{190, 128, 20_000, ""}},
		{10_000, 0, resources{190, 128, 9650, "open files"}},
		{1024, 0, resources{190, 128, 674, "open files"}},
		{128, 0, resources{32, 16, 48, "open files"}},
		{64, 0, resources{16, 8, 8, "open files"}},
		{63, 0, resources{connections: -1}},
		{65_536, 128 << 20, resources{190, 128, 2048, "memory"}},
		{1024, 128 << 20, resources{190, 128, 674, "open files"}},
		{0, 1 << 20, resources{190, 128, 256, "memory"}},
	} {
		var got resources
		var err error
		got.tables, got.http, got.connections, got.scarce, err = gateway.Share(x.files, x.memory, 8)
		if refused := x.want.connections < 0; (err != nil) != refused || !refused && got != x.want {
			t.Errorf("%d files, %d bytes: %+v, %v; want %+v", x.files, x.memory, got, err, x.want)
		}
		if x.files > 0 && err == nil && got.tables+got.http+got.connections+24+8 > x.files {
			t.Errorf("%d files: %+v takes more", x.files, got)
		}
	}
}

// TestBounds: what the broker may hold together is a part of the memory, and no more than it is without a limit.
func TestBounds(t *testing.T) {
	for _, memory := range []int64{64 << 20, 128 << 20, 1 << 30, 64 << 30} {
		c := gateway.Bounds(memory)
		sum := int64(c.MaxQueuedBytes + c.MaxRetainedBytes + c.MaxFanoutBytes + c.MaxWriteBytes + 2*c.MaxReadBytes)
		if sum > memory*5/8 || c.MaxQueuedBytes > 64<<20 || c.MaxSessions < 1000 || c.MaxSessions > 50_000 || int64(c.MaxSessions)*4<<10 > memory/2 {
			t.Errorf("%d MiB: %+v", memory>>20, c)
		}
	}
	if c := gateway.Bounds(0); c.MaxQueuedBytes != 0 || c.MaxSessions != 0 {
		t.Errorf("unknown memory: %+v", c)
	}
}

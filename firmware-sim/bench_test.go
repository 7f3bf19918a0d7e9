package firmwaresim_test

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
)

// acker acknowledges every QoS 1 PUBLISH, sends so many commands to who subscribes, and costs next to nothing.
func acker(t testing.TB, commands int) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				acknowledge(conn, commands)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func acknowledge(conn net.Conn, commands int) {
	device := ""
	in, have := make([]byte, 32<<10), 0
	var out []byte
	var p mqtt.Publish
	for {
		n, err := conn.Read(in[have:])
		if err != nil {
			return
		}
		have += n
		start := 0
		for {
			typ, _, _, size, ok, _ := mqtt.PeekHeader(in[start:have])
			if !ok || start+size > have {
				break
			}
			switch typ {
			case mqtt.TypePublish:
				if mqtt.ParsePublish(in[start:start+size], mqtt.V5, &p) != nil {
					return
				}
				out = mqtt.AppendAck(out, mqtt.TypePuback, p.ID, mqtt.V5, mqtt.Success)
			case mqtt.TypeConnect:
				if c, err := mqtt.ParseConnect(in[start : start+size]); err == nil {
					device = c.ClientID
				}
				out = mqtt.AppendConnack(out, mqtt.V5, &mqtt.Connack{})
			case mqtt.TypeSubscribe:
				s, err := mqtt.ParseSubscribe(in[start:start+size], mqtt.V5)
				if err != nil {
					return
				}
				out = mqtt.AppendSuback(out, mqtt.V5, &mqtt.Suback{ID: s.ID, Reasons: make([]mqtt.Reason, len(s.Filters))})
				for i := range commands {
					topic := []byte(wire.RequestTopic(device, fmt.Sprintf("%s.%d", device, i), "set"))
					out = mqtt.AppendPublish(out, mqtt.V5, &mqtt.Publish{QoS: 1, ID: uint16(i + 1), Topic: topic, Payload: []byte(`{"n":1}`)})
				}
			case mqtt.TypeDisconnect:
				return
			default:
			}
			start += size
		}
		have = copy(in, in[start:have])
		if _, err := conn.Write(out); err != nil {
			return
		}
		out = out[:0]
	}
}

// BenchmarkFleet is what the fleet can do at most: a server that only acknowledges shares
// the machine with it.
func BenchmarkFleet(b *testing.B) {
	for _, devices := range []int{1, 100} {
		b.Run(fmt.Sprintf("devices=%d/window=100/size=256", devices), func(b *testing.B) {
			f, err := firmwaresim.New(firmwaresim.Config{
				Broker: "mqtt://" + acker(b, 0), Devices: devices, Window: 100, Size: 256, QoS: firmwaresim.QoS1,
				Messages: uint64(b.N/devices + 1),
			}, nil)
			if err != nil {
				b.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			r, err := f.Run(b.Context())
			runtime.ReadMemStats(&after)
			if err != nil || r.Unacknowledged > 0 {
				b.Fatalf("%v\n%v", err, r)
			}
			b.ReportMetric(r.Rate, "msgs/s")
			b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(r.Published), "allocs/msg")
		})
	}
}

// BenchmarkIdleDevices is what a connected device costs: one that takes no commands, one that has had none yet, and one
// that has done 100.
func BenchmarkIdleDevices(b *testing.B) {
	for _, commands := range []int{-1, 0, 100} {
		b.Run(fmt.Sprintf("commands=%d", commands), func(b *testing.B) { idleDevices(b, commands) })
	}
}

func idleDevices(b *testing.B, commands int) {
	const devices = 2000
	for b.Loop() {
		addr := acker(b, max(commands, 0))
		f, err := firmwaresim.New(firmwaresim.Config{
			Broker: "mqtt://" + addr, Devices: devices, Rate: 0.2, ConnectRate: 1e6, Drain: -1,
			Commands: commands >= 0, Execution: firmwaresim.Execution{Duration: -1, Progress: -1},
		}, nil)
		if err != nil {
			b.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		done := make(chan struct{})
		ctx, cancel := context.WithCancel(b.Context())
		go func() {
			defer close(done)
			if _, err := f.Run(ctx); err != nil {
				b.Error(err)
			}
		}()
		for f.Snapshot().Connected < devices || f.Snapshot().Commands.Answered < uint64(devices*max(commands, 0)) {
			<-time.After(5 * time.Millisecond)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		// The server's buffer of 32 KiB and its goroutine are not the fleet's.
		b.ReportMetric((float64(after.HeapAlloc-before.HeapAlloc)/devices)/1024-32, "KiB-heap/device")
		b.ReportMetric(float64(after.StackInuse-before.StackInuse)/devices/1024/2, "KiB-stack/device")
		cancel()
		<-done
	}
}

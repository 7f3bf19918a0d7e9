package broker_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// panicWatch is a logger that counts errors: the broker survives a panic and logs it.
type panicWatch struct{ n atomic.Int32 }

func (*panicWatch) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }
func (w *panicWatch) Handle(context.Context, slog.Record) error  { w.n.Add(1); return nil }
func (w *panicWatch) WithAttrs([]slog.Attr) slog.Handler         { return w }
func (w *panicWatch) WithGroup(string) slog.Handler              { return w }

// FuzzConnection sends whatever it likes after a CONNECT, or instead of one. Nothing may panic,
// the connection must end in time once the sender is done, and the gateway must go on.
func FuzzConnection(f *testing.F) {
	for _, v := range versions {
		var b []byte
		b = mqtt.AppendPublish(b, v, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("a/b"), Payload: []byte("x"), Retain: true})
		b = mqtt.AppendPublish(b, v, &mqtt.Publish{QoS: 2, ID: 2, Topic: []byte("a/b"), Payload: []byte("y")})
		b = mqtt.AppendAck(b, mqtt.TypePubrel, 2, v, 0)
		b = mqtt.AppendSubscribe(b, v, &mqtt.Subscribe{ID: 3, Filters: []mqtt.Subscription{{Filter: "a/+/#", QoS: 2}, {Filter: "$share/g/#", QoS: 1}}})
		b = mqtt.AppendUnsubscribe(b, v, &mqtt.Unsubscribe{ID: 4, Filters: []string{"a/+/#"}})
		b = mqtt.AppendPingreq(b)
		b = mqtt.AppendDisconnect(b, v, 0, "")
		f.Add(byte(v), b)
		f.Add(byte(0), append(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "fuzz", Will: &mqtt.Will{Topic: "w"}}), b...))
	}
	p := mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("a/b")}
	everyProperty(&p)
	f.Add(byte(5), mqtt.AppendPublish(nil, mqtt.V5, &p))
	f.Add(byte(5), []byte("\x82\x06\x00\x01\x00\x00\x01a"))

	store, err := kv.Open("db", kv.Options{FS: vfs.NewMem(), Log: quiet})
	if err != nil {
		f.Fatal(err)
	}
	in := &intake{store: store}
	cfg := broker.Config{Listeners: []broker.Listener{{Name: "lan", Protocol: "mqtt", Address: "127.0.0.1:0"}}, MaxPacket: 1024}
	panics := &panicWatch{}
	b, err := broker.New(cfg, store, in, &allow{}, nil, slog.New(panics), nil)
	if err != nil {
		f.Fatal(err)
	}
	if err := b.Listen(); err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	f.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			f.Error(err)
		}
		store.Close()
	})
	addr := b.Addrs()[0].String()

	f.Fuzz(func(t *testing.T, v byte, data []byte) {
		nc, err := testDialer.DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		_ = nc.SetDeadline(time.Now().Add(patience))
		if v == 4 || v == 5 {
			hello := mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.Version(v), ClientID: "fuzz", CleanStart: len(data)%2 == 0, SessionExpiry: 100})
			if _, err := nc.Write(hello); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = nc.Write(data)
		_ = nc.(*net.TCPConn).CloseWrite()
		rest, err := io.ReadAll(nc)
		if panics.n.Load() > 0 {
			t.Fatalf("a panic at % x", data)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("is not closed after % x", data)
		}
		// What it answers is MQTT.
		version := mqtt.Version(v)
		for len(rest) > 0 && (v == 4 || v == 5) {
			_, _, _, size, ok, err := mqtt.PeekHeader(rest)
			if err != nil || !ok || size > len(rest) {
				t.Fatalf("answered % x (%v) to % x", rest, err, data)
			}
			var m mqtt.Publish
			var a mqtt.Ack
			switch frame := rest[:size]; mqtt.Type(frame[0] >> 4) {
			case mqtt.TypeConnack:
				_, err = mqtt.ParseConnack(frame, version)
			case mqtt.TypePublish:
				err = mqtt.ParseDelivery(frame, version, &m)
			case mqtt.TypePuback, mqtt.TypePubrec, mqtt.TypePubrel, mqtt.TypePubcomp:
				err = mqtt.ParseAck(frame, version, &a)
			case mqtt.TypeSuback:
				_, err = mqtt.ParseSuback(frame, version)
			case mqtt.TypeUnsuback:
				_, err = mqtt.ParseUnsuback(frame, version)
			case mqtt.TypePingresp:
			case mqtt.TypeDisconnect:
				_, err = mqtt.ParseDisconnect(frame, version, mqtt.FromServer)
			default:
				t.Fatalf("answered % x", frame)
			}
			if err != nil {
				t.Fatalf("answered % x: %v", rest[:size], err)
			}
			rest = rest[size:]
		}
	})
}

package gateway_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"go.uber.org/goleak"

	"holdfast/bridge"
	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway"
	"holdfast/gateway/broker"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func configuration(t testing.TB, dir string) *config.Config {
	t.Helper()
	c, err := config.Default()
	if err != nil {
		t.Fatal(err)
	}
	c.Gateway = config.Gateway{ID: "gw1", DataDir: dir}
	c.Listeners[0].Address, c.HTTP.Address = "127.0.0.1:0", "127.0.0.1:0"
	return c
}

// running is a gateway that runs.
type running struct {
	*gateway.Gateway
	t    *testing.T
	stop context.CancelFunc
	done chan error
}

func start(t *testing.T, c *config.Config) *running {
	t.Helper()
	g, err := gateway.New(t.Context(), gateway.Options{Config: c, Version: "test", Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	r := &running{Gateway: g, t: t, stop: cancel, done: make(chan error, 1)}
	go func() { r.done <- g.Run(ctx) }()
	t.Cleanup(r.end)
	testkit.EventuallyNil(t, 10*time.Second, "the gateway to be ready", g.Ready)
	return r
}

// end stops the gateway in order. Twice is no harm.
func (r *running) end() {
	r.t.Helper()
	r.stop()
	select {
	case err, open := <-r.done:
		if open && err != nil {
			r.t.Errorf("Run = %v", err)
		}
		if open {
			close(r.done)
		}
	case <-time.After(15 * time.Second):
		r.t.Fatal("the gateway does not stop")
	}
}

func (r *running) status() (st httpapi.Status) {
	r.t.Helper()
	resp := r.get(r.t.Context(), "/api/v1/status")
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&st); err != nil {
		r.t.Fatal(err)
	}
	return st
}

// get asks the API as the administrator.
func (r *running) get(ctx context.Context, path string) *http.Response {
	r.t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.HTTPAddr().String()+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.token())
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp
}

// token is the administrator's.
func (r *running) token() string {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.Status().DataDir, "admin.token"))
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (r *running) accepted(lane string) uint64 {
	for _, l := range r.Status().Lanes {
		if l.Name == lane {
			return l.Accepted.Messages
		}
	}
	return 0
}

// device is a client that counts its acknowledgements by reason.
type device struct {
	*mqtt.Client
	acks chan mqtt.Reason
}

func connect(t *testing.T, addr net.Addr, id string) (*device, error) {
	t.Helper()
	d := &device{acks: make(chan mqtt.Reason, 1000)}
	var err error
	d.Client, err = mqtt.Dial(t.Context(), mqtt.ClientOptions{
		Address: addr.String(), Connect: mqtt.Connect{Version: mqtt.V5, ClientID: id, CleanStart: true},
		OnAck: func(_ *mqtt.Client, a *mqtt.Ack) { d.acks <- a.Reason },
	})
	if err == nil {
		t.Cleanup(func() { d.Abort(); <-d.Done() })
	}
	return d, err
}

// publish sends one message with QoS 1 and waits for its acknowledgement.
func (d *device) publish(t *testing.T, topic, payload string) mqtt.Reason {
	t.Helper()
	if err := d.Publish(&mqtt.Publish{QoS: 1, ID: 1, Topic: []byte(topic), Payload: []byte(payload)}); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-d.acks:
		return r
	case <-d.Done():
		t.Fatalf("connection ended: %v", d.Err())
	case <-time.After(10 * time.Second):
		t.Fatal("no PUBACK")
	}
	return 0
}

func TestWhatIsAcknowledgedIsThereAfterARestart(t *testing.T) {
	c := configuration(t, filepath.Join(t.TempDir(), "deep", "data"))
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	for topic, want := range map[string]mqtt.Reason{
		"dt/a": mqtt.Success, "alarm/a": mqtt.Success, "local/a": mqtt.Success, "gw/gw1/state": mqtt.NotAuthorized, "cmd/x/req/1/y": mqtt.NotAuthorized,
	} {
		if got := d.publish(t, topic, "x"); got != want {
			t.Errorf("%s: %v, want %v", topic, got, want)
		}
	}
	before := g.status()
	if !before.Ready || before.Gateway != "gw1" || before.Version != "test" || !before.Ledger.Balanced || before.Broker.Connections != 1 {
		t.Errorf("status = %+v", before)
	}
	g.end()
	if err := g.Ready(); err == nil {
		t.Error("ready after the stop")
	}

	g = start(t, c)
	if after := g.status(); after.Epoch != before.Epoch {
		t.Errorf("epoch %s became %s", before.Epoch, after.Epoch)
	}
	for lane, want := range map[string]uint64{"telemetry": 1, "alarm": 1, "bulk": 0} {
		if got := g.accepted(lane); got != want {
			t.Errorf("lane %s has accepted %d messages, want %d", lane, got, want)
		}
	}
}

func TestNobodyGetsInWithoutAnonymous(t *testing.T) {
	c := configuration(t, t.TempDir())
	c.Devices.Anonymous = false
	g := start(t, c)
	_, err := connect(t, g.Addrs()[0], "dev1")
	var refused *mqtt.Refused
	if !errors.As(err, &refused) {
		t.Errorf("connect = %v", err)
	}
}

func TestAFullLaneTellsTheDevice(t *testing.T) {
	c := configuration(t, t.TempDir())
	c.Spool.Lanes = []spool.LaneConfig{{Name: "telemetry", Share: 100, MaxBytes: 4 << 10, WhenFull: spool.Reject}}
	c.Routes = nil
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	full := false
	for range 20 {
		switch r := d.publish(t, "dt/a", strings.Repeat("x", 512)); r {
		case mqtt.Success:
			if full {
				t.Error("a full lane took a message")
			}
		case mqtt.QuotaExceeded:
			full = true
		default:
			t.Fatalf("reason %v", r)
		}
	}
	if !full {
		t.Error("the lane was never full")
	}
}

func TestAnAddressInUseGivesEverythingBack(t *testing.T) {
	first := start(t, configuration(t, t.TempDir()))
	for name, change := range map[string]func(*config.Config){
		"listener": func(c *config.Config) { c.Listeners[0].Address = first.Addrs()[0].String() },
		"http":     func(c *config.Config) { c.HTTP.Address = first.HTTPAddr().String() },
	} {
		t.Run(name, func(t *testing.T) {
			c := configuration(t, t.TempDir())
			change(c)
			_, err := gateway.New(t.Context(), gateway.Options{Config: c, Log: testkit.Logger(t)})
			if err == nil || !strings.Contains(err.Error(), "in use") {
				t.Fatalf("New = %v", err)
			}
			// The data directory is free again, and so is everything else: goleak looks.
			g, err := gateway.New(t.Context(), gateway.Options{Config: configuration(t, c.Gateway.DataDir), Log: testkit.Logger(t)})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(g.Close(), g.Close()); err != nil {
				t.Errorf("Close = %v", err)
			}
		})
	}
}

func TestADataDirectoryHasOneOwner(t *testing.T) {
	c := configuration(t, t.TempDir())
	g := start(t, c)
	_, err := gateway.New(t.Context(), gateway.Options{Config: c, Log: testkit.Logger(t)})
	var inUse *gateway.InUseError
	if !errors.As(err, &inUse) || inUse.PID != os.Getpid() || !strings.Contains(err.Error(), "gateway.data_dir") {
		t.Errorf("second gateway: %v", err)
	}
	if _, _, err := gateway.OpenSpool(c.Gateway.DataDir, testkit.Logger(t)); !errors.As(err, &inUse) {
		t.Errorf("tool beside a running gateway: %v", err)
	}
	g.end()
	sp, closeAll, err := gateway.OpenSpool(c.Gateway.DataDir, testkit.Logger(t))
	if err != nil {
		t.Fatal(err)
	}
	if sp.Epoch() == "" {
		t.Error("no epoch")
	}
	if err := closeAll(); err != nil {
		t.Error(err)
	}
}

func TestToolsMakeNoDataDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	if _, _, err := gateway.OpenSpool(dir, testkit.Logger(t)); err == nil || !strings.Contains(err.Error(), "no gateway has kept anything in "+dir) {
		t.Errorf("OpenSpool = %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tool made %s", dir)
	}
}

func TestDataDirectories(t *testing.T) {
	t.Run("is private", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a", "b")
		d, err := gateway.OpenDataDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		fi, err := os.Stat(dir)
		if err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("mode %v, %v", fi.Mode(), err)
		}
	})
	t.Run("is a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := gateway.OpenDataDir(file); err == nil || !strings.Contains(err.Error(), "is a file") {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("left behind by a crash", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "holdfast.lock"), []byte("1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := gateway.OpenDataDir(dir)
		if err != nil {
			t.Fatalf("a lock file that nobody holds is in the way: %v", err)
		}
		d.Close()
	})
}

// startUpstream runs a broker that takes everything, and gives its address.
func startUpstream(t *testing.T) string {
	t.Helper()
	up, err := broker.New(broker.Config{Listeners: []broker.Listener{{Name: "up", Protocol: "mqtt", Address: "127.0.0.1:0"}}},
		openStore(t), acceptAll{}, everybody{}, nil, testkit.Logger(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := up.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- up.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return up.Addrs()[0].String()
}

func TestMessagesGoUpstream(t *testing.T) {
	up := startUpstream(t)
	c := configuration(t, t.TempDir())
	c.Upstreams = []bridge.Config{
		{Name: "batches", URL: "mqtt://" + up, Format: bridge.FormatBatch},
		{Name: "plain", URL: "mqtt://" + up, Format: bridge.FormatPassthrough, TopicPrefix: "site/", Lanes: []string{"alarm"}},
	}
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if r := d.publish(t, []string{"dt/x", "alarm/x"}[i%2], fmt.Sprint(i)); r != mqtt.Success {
			t.Fatalf("reason %v", r)
		}
	}
	testkit.EventuallyNil(t, 15*time.Second, "all to be delivered", func() error {
		st := g.Status()
		want := map[string]uint64{
			"batches/alarm": 5, "batches/telemetry": 5, "batches/bulk": 0, "plain/alarm": 5,
			"batches/system": 1, "plain/system": 1, // that the device is on-line
		}
		for _, a := range st.Ledger.Accounts {
			key := a.Upstream + "/" + a.Lane
			if n, ok := want[key]; !ok || a.Delivered.Messages != n || a.Pending.Messages != 0 {
				return fmt.Errorf("account %s: %+v", key, a)
			}
			delete(want, key)
		}
		if len(want) > 0 || !st.Ledger.Balanced {
			return fmt.Errorf("accounts missing: %v; balanced %v", want, st.Ledger.Balanced)
		}
		return nil
	})
	for _, u := range g.status().Upstreams {
		if !u.Connected || u.State != "connected" || u.LastAck.IsZero() {
			t.Errorf("upstream = %+v", u)
		}
	}
}

// An upstream that hangs holds no stop up, and what it has not acknowledged is sent again.
func TestAStopIsBounded(t *testing.T) {
	proxy := testkit.StartProxy(t, startUpstream(t))
	c := configuration(t, t.TempDir())
	c.Upstreams = []bridge.Config{{Name: "up", URL: "mqtt://" + proxy.Addr(), Format: bridge.FormatCloudEvents}}
	g := start(t, c)
	testkit.Eventually(t, 10*time.Second, "the upstream is connected", func() bool { return g.Status().Upstreams[0].Connected })
	proxy.Set(testkit.Faults{BlackholeUp: true, BlackholeDown: true})
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if r := d.publish(t, "dt/x", "y"); r != mqtt.Success {
			t.Fatalf("reason %v", r)
		}
	}
	testkit.Eventually(t, 10*time.Second, "sends are in flight", func() bool { return g.Status().Upstreams[0].InFlight > 0 })
	begin := time.Now()
	g.end() // Run has to return nil: nothing was stuck
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("the stop took %v", took)
	}
	proxy.Set(testkit.Faults{})
	g = start(t, c)
	testkit.EventuallyNil(t, 15*time.Second, "all to be delivered", func() error {
		for _, a := range g.Status().Ledger.Accounts {
			if a.Lane == "telemetry" && a.Delivered.Messages != 3 {
				return fmt.Errorf("account %+v", a)
			}
		}
		return nil
	})
}

type acceptAll struct{}

func (acceptAll) Publish(_ *broker.Message, _ []kv.Op, done kv.Done, token uint64) error {
	go done.Done(token, 1, nil)
	return nil
}

type everybody struct{}

func (e everybody) Connect(context.Context, *broker.ConnectInfo) (broker.Rights, error) {
	return e, nil
}
func (e everybody) Rights(string) broker.Rights { return e }
func (everybody) MayPublish([]byte) bool        { return true }
func (everybody) MaySubscribe(string) bool      { return true }
func (everybody) Limits() broker.Limits         { return broker.Limits{} }

func openStore(t *testing.T) *kv.Store {
	t.Helper()
	store, err := kv.Open("", kv.Options{FS: vfs.NewMem(), Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// spool writes announcements and wire reads them, and neither imports the other.
func TestAnnouncementsReadAsTheyAreWritten(t *testing.T) {
	store := openStore(t)
	sp, err := spool.Open(store, spool.Config{
		Gateway: "gw1", GapTopic: wire.GapTopic("gw1"), Log: testkit.Logger(t), Upstreams: map[string][]string{"cloud": nil},
		Lanes: []spool.LaneConfig{{Name: "telemetry", Share: 100, MaxBytes: 2000, WhenFull: spool.DropOldest}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sp.Close()
	lane, _ := sp.Lane("telemetry")
	for i := range 20 {
		if err := sp.Append(lane, &spool.Record{Received: int64(1000 + i), Topic: []byte("t"), Payload: make([]byte, 500)}, nil, nil, 0, false); err != nil {
			t.Fatal(err)
		}
		if err := store.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	testkit.EventuallyNil(t, 10*time.Second, "an announcement", func() error {
		if err := store.Flush(); err != nil {
			return err
		}
		if sp.Lanes()[0].Kept.Messages == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	found := 0
	err = sp.Peek(spool.SystemLane, 0, 100, func(_ uint64, r *spool.Record) error {
		found++
		if topic := wire.ParseTopic(string(r.Topic)); topic.Kind != wire.KindGap {
			t.Errorf("topic %q is %v", r.Topic, topic)
		}
		gap, err := wire.DecodeGap(r.Payload)
		if err != nil {
			return err
		}
		if gap.Gateway != "gw1" || gap.Epoch != sp.Epoch() || gap.Lane != "telemetry" || gap.Upstream != "cloud" || gap.First == 0 ||
			gap.Last < gap.First || gap.Count != gap.Last-gap.First+1 || gap.Bytes == 0 || gap.FromMS < 1000 || gap.ToMS < gap.FromMS || gap.Reason != "max_bytes" {
			t.Errorf("gap = %+v", gap)
		}
		strict := json.NewDecoder(bytes.NewReader(r.Payload))
		strict.DisallowUnknownFields()
		if err := strict.Decode(&wire.Gap{}); err != nil {
			t.Errorf("spool writes what wire does not know: %v", err)
		}
		return nil
	})
	if err != nil || found == 0 {
		t.Errorf("%d announcements, %v", found, err)
	}
}

// spool writes records by hand and wire reads them with a CBOR library: each checks the other.
func TestRecordsReadAsTheyAreWritten(t *testing.T) {
	for name, r := range map[string]spool.Record{
		"least": {},
		"plain": {Received: 1795420443540, Device: []byte("dev1"), Topic: []byte("dt/a"), Flags: spool.FlagQoS1 | spool.FlagClockUnsynced, Payload: []byte{0, 1, 255}},
		"full": {
			Received: -1, Device: []byte("ä"), Topic: []byte("t"), Flags: spool.FlagQoS2 | spool.FlagRetain | spool.FlagDup | spool.FlagWill,
			Payload: make([]byte, 70_000), Props: &spool.Props{
				ContentType: "text/plain", ResponseTopic: "r", Correlation: []byte{1},
				User: [][2]string{{"a", "b"}, {"a", ""}}, UTF8: true, Expiry: 1 << 31, Upstream: "cloud",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, rest, err := wire.DecodeMessage(spool.AppendRecord(nil, &r))
			if err != nil || len(rest) != 0 {
				t.Fatalf("%v, %d bytes left", err, len(rest))
			}
			if m.Received != r.Received || m.Device != string(r.Device) || m.Topic != string(r.Topic) || uint64(m.Flags) != uint64(r.Flags) || !bytes.Equal(m.Payload, r.Payload) {
				t.Errorf("read %+v", m)
			}
			if (m.Props == nil) != (r.Props == nil) {
				t.Fatalf("properties %+v", m.Props)
			}
			if p := m.Props; p != nil && (p.ContentType != r.Props.ContentType || p.ResponseTopic != r.Props.ResponseTopic ||
				!bytes.Equal(p.Correlation, r.Props.Correlation) || len(p.User) != 2 || p.User[0] != r.Props.User[0] || p.User[1] != r.Props.User[1] ||
				p.Format != 1 || p.Expiry != r.Props.Expiry) {
				t.Errorf("properties %+v", p)
			}
		})
	}
}

// A failed fsync ends the gateway at once, and what waited for it is never acknowledged. The store
// leaves goroutines behind by intention, so this runs in a process of its own.
func TestAFailedFsyncEndsTheGateway(t *testing.T) {
	if os.Getenv("HOLDFAST_FAILED_FSYNC") == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAFailedFsyncEndsTheGateway$", "-test.v")
		cmd.Env = append(os.Environ(), "HOLDFAST_FAILED_FSYNC=1")
		out, err := cmd.CombinedOutput()
		// goleak of that process may complain; the line says that all else went well
		if !strings.Contains(string(out), "ended as it should") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	var broken atomic.Bool
	handedIn := make(chan struct{})
	fsys := errorfs.Wrap(vfs.Default, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if broken.Load() && (op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSyncTo) {
			<-handedIn
			return errors.New("input/output error")
		}
		return nil
	}))
	dir := t.TempDir()
	opts := gateway.Options{Config: configuration(t, dir), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	g, err := gateway.New(t.Context(), gateway.WithFS(opts, fsys))
	if err != nil {
		t.Fatal(err)
	}
	var shown atomic.Int64 // steps of commands
	gateway.Watch(g, func(e devices.Event, _ func(string) (devices.Command, error)) {
		if e.Command != nil {
			shown.Add(1)
		}
	})
	ended := make(chan error, 1)
	go func() { ended <- g.Run(t.Context()) }()
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	if r := d.publish(t, "dt/a", "before"); r != mqtt.Success {
		t.Fatalf("reason %v", r)
	}
	if status, body := call(t, g, dir, "POST", "/api/v1/devices/dev1/commands", `{"id":"before","name":"stop"}`); status != http.StatusCreated {
		t.Fatalf("%d: %s", status, body)
	}
	steps := shown.Load()
	broken.Store(true)
	if err := d.Publish(&mqtt.Publish{QoS: 1, ID: 2, Topic: []byte("dt/a"), Payload: []byte("after")}); err != nil {
		t.Fatal(err)
	}
	answered := make(chan int, 1)
	go func() {
		status, _ := call(t, g, dir, "POST", "/api/v1/devices/dev1/commands", `{"id":"after","name":"stop"}`)
		answered <- status
	}()
	// Nothing shows of it, which is the point; but who calls it off waits until it is handed in.
	testkit.Eventually(t, 10*time.Second, "the second command to be handed in", func() bool {
		known := true
		err := gateway.Commands(g).Cancel("dev1", "after", "", "", func(_ devices.Command, err error) {
			if errors.As(err, new(*devices.Refusal)) {
				known = false
			}
		})
		return err == nil && known
	})
	if n := g.Status().Commands; n.Queued != 1 || n.Submitted != 1 {
		t.Errorf("counts show what is not on disk: %+v", n)
	}
	close(handedIn)
	select {
	case err := <-ended:
		if !errors.Is(err, gateway.ErrStore) {
			t.Errorf("Run = %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the gateway goes on over a failed fsync")
	}
	if g.Ready() == nil {
		t.Error("ready without a store")
	}
	over := time.After(200 * time.Millisecond) // as long as it lives: main ends the process right away
	for living := true; living; {
		select {
		case r := <-d.acks:
			t.Errorf("acknowledged with %v what is not on disk", r)
		case status := <-answered:
			if status < 500 {
				t.Errorf("a command that is not on disk is answered %d", status)
			}
		case <-over:
			living = false
		}
	}
	if n := shown.Load(); n != steps {
		t.Errorf("%d steps of commands are shown that are not on disk", n-steps)
	}
	if !t.Failed() {
		fmt.Println("ended as it should")
	}
	os.Exit(0)
}

package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
	"holdfast/internal/logs"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

func changedKeys(changes []config.Change) (keys []string) {
	for _, c := range changes {
		keys = append(keys, c.Key)
	}
	return keys
}

// reload takes a configuration that has to be right, and wants these keys changed at once.
func (r *running) reload(c *config.Config, want ...string) {
	r.t.Helper()
	planned, err := r.PlanReload(c)
	if err != nil {
		r.t.Fatal(err)
	}
	report, err := r.Reload(c)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, got := range [][]string{changedKeys(report.Changed), changedKeys(planned.Changed)} {
		if !slices.Equal(got, want) {
			r.t.Errorf("changed %v, want %v", got, want)
		}
	}
}

func (r *running) account(upstream, lane string) (a spool.Account, ok bool) {
	for _, a := range r.Status().Ledger.Accounts {
		if a.Upstream == upstream && a.Lane == lane {
			return a, true
		}
	}
	return a, false
}

// letIn says whether the gateway lets an unknown client in without credentials.
func letIn(t *testing.T, r *running) bool {
	t.Helper()
	_, port, err := net.SplitHostPort(r.Addrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: net.JoinHostPort("127.0.0.1", port), Connect: mqtt.Connect{Version: mqtt.V5, ClientID: "stranger"},
	})
	if err == nil {
		c.Abort()
		return true
	}
	var refused *mqtt.Refused
	if !errors.As(err, &refused) {
		t.Fatal(err)
	}
	return false
}

// The rule that no stranger comes in from the network holds for the listeners that are open, not for those that a
// restart would open.
func TestReloadKeepsStrangersOutOfOpenListeners(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t, dir)
	c.Devices.Anonymous = false
	c.Listeners[0].Address = "0.0.0.0:0"
	r := start(t, c)
	if letIn(t, r) {
		t.Fatal("a stranger is let in")
	}

	next := configuration(t, dir) // anonymous, on a listener of this machine's own
	if _, err := r.Reload(next); err == nil || !strings.Contains(err.Error(), "restart") {
		t.Errorf("Reload = %v, want an error that names the way out", err)
	}
	if letIn(t, r) {
		t.Error("a stranger is let in from the network")
	}

	next.Devices.AllowAnonymousOnNetwork = true
	report, err := r.Reload(next)
	if want := []string{"listeners[local].address"}; err != nil || !slices.Equal(changedKeys(report.Restart), want) {
		t.Errorf("Reload = %v, %v, want a restart for %v", report, err, want)
	}
	if !letIn(t, r) {
		t.Error("a stranger is refused although the configuration says that the network keeps them out")
	}
}

// What is wrong leaves everything as it was.
func TestReloadTakesAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t, dir)
	r := start(t, c)
	next := configuration(t, dir)
	next.Devices.Anonymous = false
	next.Devices.Roles = []devices.Role{{Name: "wrong", Publish: []string{"a/#/b"}}}
	if _, err := r.Reload(next); err == nil {
		t.Fatal("a wrong role is taken")
	}
	if !letIn(t, r) {
		t.Error("devices.anonymous was taken from a configuration that is wrong")
	}
}

func TestReloadTakesLimitsAndRoutesAndLogLevel(t *testing.T) {
	dir := t.TempDir()
	r := start(t, configuration(t, dir))
	d, err := connect(t, r.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	if got := d.publish(t, "dt/x", "x"); got != mqtt.Success || r.accepted("telemetry") != 1 {
		t.Fatalf("%v", got)
	}
	next := configuration(t, dir)
	for i := range next.Spool.Lanes {
		if l := &next.Spool.Lanes[i]; l.Name == "bulk" {
			l.MaxBytes, l.WhenFull = 1, spool.Reject
		}
	}
	next.Routes = []config.Route{{Match: "dt/#", Lane: "bulk"}}
	next.Log.Level = "warn"
	r.reload(next, "spool.lanes[bulk].max_bytes", "spool.lanes[bulk].when_full", "routes", "log.level")
	if r.LogLevel() != "warn" {
		t.Errorf("log level is %s", r.LogLevel())
	}
	if got := d.publish(t, "dt/x", "x"); got != mqtt.Success || r.accepted("bulk") != 1 {
		t.Errorf("by the new route: %v", got)
	}
	if got := d.publish(t, "dt/x", "x"); got != mqtt.QuotaExceeded {
		t.Errorf("a full lane that rejects: %v", got)
	}
	r.reload(next) // nothing is different any more
	r.reload(configuration(t, dir), "spool.lanes[bulk].max_bytes", "spool.lanes[bulk].when_full", "routes", "log.level")
	if got := d.publish(t, "dt/x", "x"); got != mqtt.Success || r.accepted("telemetry") != 2 {
		t.Errorf("back again: %v", got)
	}
}

// What stands on a lane that is not there yet waits for the restart with it.
func TestReloadLeavesNewLanesToARestart(t *testing.T) {
	dir := t.TempDir()
	r := start(t, configuration(t, dir))
	next := configuration(t, dir)
	next.Spool.Lanes = append(next.Spool.Lanes, spool.LaneConfig{Name: "video", Share: 10, WhenFull: spool.DropOldest})
	next.Spool.Lanes[0].MaxBytes = 1 << 20
	next.Routes = append(next.Routes, config.Route{Match: "v/#", Lane: "video"})
	next.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://127.0.0.1:1", Lanes: []string{"video"}}}
	report, err := r.Reload(next)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"spool.lanes[alarm].max_bytes"}; !slices.Equal(changedKeys(report.Changed), want) {
		t.Errorf("changed %v, want %v", report.Changed, want)
	}
	if want := []string{"spool.lanes[video]", "routes", "upstreams[cloud]"}; !slices.Equal(changedKeys(report.Restart), want) {
		t.Errorf("after a restart %v, want %v", changedKeys(report.Restart), want)
	}
	r.end()
	r = start(t, next)
	r.reload(next)
}

func TestReloadAddsChangesAndRemovesUpstreams(t *testing.T) {
	dir := t.TempDir()
	up := startUpstream(t)
	r := start(t, configuration(t, dir))
	d, err := connect(t, r.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	send := func(n int) {
		t.Helper()
		for range n {
			if got := d.publish(t, "dt/x", "x"); got != mqtt.Success {
				t.Fatal(got)
			}
		}
	}
	send(3) // before there is any upstream
	with := func(us ...bridge.Config) *config.Config {
		c := configuration(t, dir)
		c.Upstreams = us
		return c
	}
	cloud := bridge.Config{Name: "cloud", URL: "mqtt://" + up, Format: bridge.FormatPassthrough, TopicPrefix: "up/", Window: 16, Commands: true}
	lab := bridge.Config{Name: "lab", URL: "mqtt://127.0.0.1:1", Format: bridge.FormatBatch, Window: 16}

	r.reload(with(cloud, lab), "upstreams[cloud]", "upstreams[lab]")
	send(2)
	testkit.Eventually(t, 10*time.Second, "everything to be upstream", func() bool {
		a, _ := r.account("cloud", "telemetry")
		return a.Delivered.Messages == 5
	})
	testkit.Eventually(t, 10*time.Second, "commands to come down", func() bool {
		u := r.Status().Upstreams[0]
		return u.Commands != nil && *u.Commands
	})
	if a, ok := r.account("lab", "telemetry"); !ok || a.Pending.Messages != 5 {
		t.Errorf("lab: %+v", a)
	}

	// One changes, the other's link does not notice.
	since := r.Status().Upstreams[0].Since
	lab.URL = "mqtt://" + up
	r.reload(with(cloud, lab), "upstreams[lab].url")
	testkit.Eventually(t, 10*time.Second, "lab to have everything", func() bool {
		a, _ := r.account("lab", "telemetry")
		return a.Delivered.Messages == 5
	})
	if now := r.Status().Upstreams[0].Since; !now.Equal(since) {
		t.Errorf("the link to cloud is of %v, was of %v", now, since)
	}

	// One leaves: nothing waits for it any more. It comes back: what was dropped meanwhile is in its account.
	lab.URL = "mqtt://127.0.0.1:1"
	r.reload(with(cloud, lab), "upstreams[lab].url")
	send(4)
	r.reload(with(cloud), "upstreams[lab]")
	if _, ok := r.account("lab", "telemetry"); ok || len(r.Status().Upstreams) != 1 {
		t.Errorf("lab is still there: %+v", r.Status().Upstreams)
	}
	testkit.Eventually(t, 10*time.Second, "nothing to be kept", func() bool {
		for _, l := range r.Status().Lanes {
			if l.Name == "telemetry" {
				return l.Kept.Messages == 0
			}
		}
		return false
	})
	lab.URL = "mqtt://" + up
	r.reload(with(cloud, lab), "upstreams[lab]")
	a, _ := r.account("lab", "telemetry")
	if a.Evicted.Messages != 4 || a.Delivered.Messages != 5 || a.Accepted.Messages != 9 || !a.Balanced() {
		t.Errorf("lab: %+v", a)
	}

	// A lane less.
	cloud.Lanes = []string{"alarm", "bulk"}
	r.reload(with(cloud, lab), "upstreams[cloud].lanes")
	if a, ok := r.account("cloud", "telemetry"); ok {
		t.Errorf("telemetry still waits for cloud: %+v", a)
	}
	send(1)
	testkit.Eventually(t, 10*time.Second, "lab to have the last one", func() bool {
		a, _ := r.account("lab", "telemetry")
		return a.Delivered.Messages == 6
	})

	// Another share has every link begin anew, and the order of a lane changes.
	next := with(cloud, lab)
	next.Spool.Lanes[1].Drain, next.Spool.Lanes[1].Share = spool.LiveFirst, 45
	r.reload(next, "spool.lanes[telemetry].share", "spool.lanes[telemetry].drain")
	send(1)
	testkit.Eventually(t, 10*time.Second, "lab to have that, too", func() bool {
		a, _ := r.account("lab", "telemetry")
		return a.Delivered.Messages == 7
	})
	for _, a := range r.Status().Ledger.Accounts {
		if !a.Balanced() {
			t.Errorf("%+v", a)
		}
	}
	r.end()
	r = start(t, next)
	if a, _ := r.account("lab", "telemetry"); a.Delivered.Messages != 7 || a.Evicted.Messages != 4 || a.Pending.Messages != 0 {
		t.Errorf("after a restart: %+v", a)
	}
}

// What is wrong anywhere leaves everything as it was, also what would have been taken before it.
func TestReloadOfAWrongUpstreamChangesNothing(t *testing.T) {
	dir := t.TempDir()
	up := startUpstream(t)
	c := configuration(t, dir)
	c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + up, Format: bridge.FormatBatch, Window: 16}}
	r := start(t, c)
	testkit.Eventually(t, 10*time.Second, "the link to be up", func() bool { return r.Status().Upstreams[0].Connected })
	before := r.Status().Upstreams[0].Since
	next := configuration(t, dir)
	next.Devices.Anonymous = false
	next.Spool.Lanes[0].MaxBytes = 1
	next.Routes = nil
	next.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + up, Window: 17}, {Name: "wrong", URL: "gopher://x"}}
	if _, err := r.Reload(next); err == nil || !strings.Contains(err.Error(), `upstream "wrong"`) {
		t.Fatalf("Reload = %v", err)
	}
	if !letIn(t, r) || !r.Status().Upstreams[0].Since.Equal(before) {
		t.Error("something of it was taken")
	}
	r.reload(c)
}

func TestReloadWhileMessagesCome(t *testing.T) {
	dir := t.TempDir()
	up := startUpstream(t)
	cfg := func(window int, n int64) *config.Config {
		c := configuration(t, dir)
		c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + up, Format: bridge.FormatPassthrough, Window: window}}
		c.Spool.Lanes[1].MaxAge = time.Duration(n) * time.Hour
		return c
	}
	r := start(t, cfg(8, 1))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	sent := make([]uint64, 3)
	for i := range sent {
		d, err := connect(t, r.Addrs()[0], fmt.Sprint("dev", i))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := d.Publish(&mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("dt/x"), Payload: []byte("x")}); err != nil {
					t.Error(err)
					return
				}
				if reason := <-d.acks; reason != mqtt.Success {
					t.Errorf("reason %v", reason)
					return
				}
				sent[i]++
			}
		})
	}
	for n := range int64(5) {
		if _, err := r.Reload(cfg(9+int(n), 2+n)); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	testkit.Eventually(t, 20*time.Second, "everything to be upstream", func() bool {
		a, _ := r.account("cloud", "telemetry")
		return a.Delivered.Messages == sent[0]+sent[1]+sent[2] && a.Balanced()
	})
}

// withFile starts a gateway that has a file, and gives its log.
func withFile(t *testing.T, file string) (*gateway.Gateway, *testkit.Buffer) {
	t.Helper()
	out := &testkit.Buffer{}
	levels := logs.New(slog.LevelInfo)
	load := func() (*config.Config, config.Problems, error) { return config.Load(file) }
	c, _, err := load()
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(t.Context(), gateway.Options{
		Config: c, Log: slog.New(levels.Handler(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))), Logs: levels, File: file, Load: load,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g, out
}

func TestTheConfigurationIsReadAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "g.yaml")
	const right = "gateway: { id: gw1, data_dir: data }\nlisteners: [{ name: lan, protocol: mqtt, address: \"127.0.0.1:0\" }]\nhttp: { address: \"127.0.0.1:0\" }\n"
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(right)
	g, out := withFile(t, file)
	for _, tc := range []struct {
		name, text string
		want       []string // in the log
		result     string   // in the audit log
	}{
		{"right", strings.Replace(right, "gw1", "other", 1) + "log: { level: debug }\n", []string{
			`level=INFO msg="configuration read again"`, `changed=[log.level]`,
			`level=WARN msg="configuration has changes that need a restart" keys=[gateway.id]`,
		}, "done"},
		{"warned of", right + "spool: { durability: interval }\n", []string{"warning: spool.durability"}, "done"},
		{"wrong", right + "log: { levle: x }\nrouts: 1\n", []string{
			`level=ERROR msg="configuration is wrong, the old one stays"`, "key=log.levle line=4", "key=routs line=5",
		}, "refused"},
		{"another level", right + "devices: { anonymous: true }\nlog: { level: error }\n", nil, "done"},
		{"gone", "", []string{`level=ERROR msg="configuration cannot be read, the old one stays"`}, "refused"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if write(tc.text); tc.text == "" {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
			planned, planErr := g.ConfigDiff()
			g.Hangup("signal hangup")
			for _, want := range tc.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %s in\n%s", want, out.String())
				}
			}
			_, records := acts(t, filepath.Join(filepath.Dir(file), "data"))
			last := records[len(records)-1]
			if last.Act != "reload" || last.Who != "signal hangup" || last.Object != file || last.Result != tc.result {
				t.Errorf("noted %+v", last)
			}
			if errors.Is(planErr, httpapi.ErrConfig) != (tc.result == "refused") || planErr == nil && last.Detail != planned.Summary() {
				t.Errorf("planned %v, %v; done %s", planned, planErr, last.Detail)
			}
		})
	}
}

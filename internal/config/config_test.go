package config_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/internal/config"
	"holdfast/spool"
)

// minimal is a file that is right and says as little as a useful one can.
const minimal = "gateway: { id: gw1 }\ndevices: { anonymous: true }\n"

func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	c, _, err := config.Parse("/etc/holdfast/gateway.yaml", []byte(text))
	if err != nil {
		t.Fatalf("parse:\n%v", err)
	}
	return c
}

// problems gives the lines that a wrong file is answered with.
func problems(t *testing.T, text string) []string {
	t.Helper()
	_, _, err := config.Parse("g.yaml", []byte(text))
	if err == nil {
		return nil
	}
	var ps config.Problems
	if !errors.As(err, &ps) {
		t.Fatalf("error is %T, want Problems: %v", err, err)
	}
	lines := make([]string, len(ps))
	for i, p := range ps {
		if p.Warning {
			t.Errorf("a warning among errors: %s", p)
		}
		lines[i] = p.String()
	}
	return lines
}

func TestDefaultsAreThoseOfTheManual(t *testing.T) {
	got := parse(t, minimal)
	want := &config.Config{
		Gateway:   config.Gateway{ID: "gw1", DataDir: "/var/lib/holdfast"},
		Listeners: []broker.Listener{{Name: "local", Protocol: "mqtt", Address: "127.0.0.1:1883"}},
		Devices: config.Devices{Anonymous: true, Commands: config.Commands{
			Window: 1, AckTimeout: 30 * time.Second, History: 168 * time.Hour, MaxPending: 200_000,
		}},
		Spool: config.Spool{
			Durability: "fsync", SyncInterval: 100 * time.Millisecond,
			Lanes: []spool.LaneConfig{
				{Name: "alarm", Share: 50, MaxBytes: 256 << 20, MaxAge: 720 * time.Hour, WhenFull: spool.Reject, Drain: spool.InOrder, BackfillShare: 30},
				{Name: "telemetry", Share: 40, MaxBytes: 8 << 30, MaxAge: 168 * time.Hour, WhenFull: spool.DropOldest, Drain: spool.InOrder, BackfillShare: 30},
				{Name: "bulk", Share: 10, MaxBytes: 2 << 30, MaxAge: 72 * time.Hour, WhenFull: spool.DropOldest, Drain: spool.InOrder, BackfillShare: 30},
			},
		},
		Routes:    []config.Route{{Match: "alarm/#", Lane: "alarm"}, {Match: "local/#", Lane: "none"}},
		Upstreams: []bridge.Config{},
		HTTP:      config.HTTP{Address: "127.0.0.1:8080"},
		Log:       config.Log{Level: "info", Format: "auto"},
		Traces:    config.Traces{Every: 100},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
}

func TestWithoutAFileOnlyThisMachineGetsIn(t *testing.T) {
	c, err := config.Default()
	if err != nil {
		t.Fatal(err)
	}
	if !c.Devices.Anonymous || c.Gateway.DataDir != "holdfast-data" || len(c.Upstreams) != 0 {
		t.Errorf("default = %+v", c)
	}
	for _, l := range c.Listeners {
		if !config.Loopback(l.Address) {
			t.Errorf("default listener %s on %s is reached by other machines", l.Name, l.Address)
		}
	}
	if !config.Loopback(c.HTTP.Address) {
		t.Errorf("default http.address %s is reached by other machines", c.HTTP.Address)
	}
}

func TestEveryKeyOfTheManualIsRead(t *testing.T) {
	got := parse(t, `
gateway:
  id: ward-3-east
  data_dir: data
listeners:
  - { name: lan, protocol: mqtt, address: "127.0.0.1:1883" }
  - { name: tls, protocol: mqtts, address: "0.0.0.0:8883", tls: { cert: c.pem, key: k.pem, client_ca: /ca.pem, require_client_cert: true, crl: crl.pem } }
  - { name: web, protocol: ws, address: "127.0.0.1:8083", max_connections: 12 }
devices:
  anonymous: true
  allow_anonymous_on_network: true
  roles:
    - { name: pump, publish: ["dt/{device}/#"], subscribe: ["cmd/{device}/req/#", "+/{device}"],
        limits: { connects_per_minute: 6, messages_per_second: 10, bytes_per_second: 64KiB } }
    - { name: mute }
  commands: { window: 4, ack_timeout: 90s, history: 7d, max_pending: 1000 }
spool:
  durability: interval
  sync_interval: 250ms
  disk_reserve: 1.5GiB
  lanes:
    - { name: vitals, share: 70, max_bytes: 1GiB, max_age: 30d, when_full: reject }
    - { name: telemetry }
    - { name: logs, max_bytes: 0, max_age: 0, drain: live_first, backfill_share: 50 }
routes:
  - { match: "vitals/+/#", lane: vitals }
  - { match: "local/#", lane: none }
upstreams:
  - name: cloud
    url: mqtts://broker.example.com:8883
    format: passthrough
    topic_prefix: site-7/
    username: ward-3-east
    password_file: secret/pw
    tls: { ca: ca.pem, cert: c.pem, key: k.pem }
    lanes: [telemetry, vitals]
    window: 64
    commands: false
http:
  address: "[::1]:9000"
log: { level: debug, format: json }
traces: { endpoint: "https://otel.example.com/v1/traces", every: 7 }
`)
	want := &config.Config{
		Gateway: config.Gateway{ID: "ward-3-east", DataDir: "/etc/holdfast/data"},
		Listeners: []broker.Listener{
			{Name: "lan", Protocol: "mqtt", Address: "127.0.0.1:1883"},
			{Name: "tls", Protocol: "mqtts", Address: "0.0.0.0:8883", TLS: broker.TLS{
				Cert: "/etc/holdfast/c.pem", Key: "/etc/holdfast/k.pem", ClientCA: "/ca.pem", RequireClientCert: true,
				CRL: "/etc/holdfast/crl.pem",
			}},
			{Name: "web", Protocol: "ws", Address: "127.0.0.1:8083", MaxConnections: 12},
		},
		Devices: config.Devices{
			Anonymous: true, AllowAnonymousOnNetwork: true,
			Roles: []devices.Role{
				{
					Name: "pump", Publish: []string{"dt/{device}/#"}, Subscribe: []string{"cmd/{device}/req/#", "+/{device}"},
					Limits: devices.Limits{ConnectsPerMinute: 6, MessagesPerSecond: 10, BytesPerSecond: 64 << 10},
				},
				{Name: "mute"},
			},
			Commands: config.Commands{Window: 4, AckTimeout: 90 * time.Second, History: 168 * time.Hour, MaxPending: 1000},
		},
		Spool: config.Spool{
			Durability: "interval", SyncInterval: 250 * time.Millisecond, DiskReserve: 3 << 29,
			Lanes: []spool.LaneConfig{
				{Name: "vitals", Share: 70, MaxBytes: 1 << 30, MaxAge: 720 * time.Hour, WhenFull: spool.Reject, Drain: spool.InOrder, BackfillShare: 30},
				{Name: "telemetry", Share: 15, MaxBytes: 1 << 30, MaxAge: 168 * time.Hour, WhenFull: spool.DropOldest, Drain: spool.InOrder, BackfillShare: 30},
				{Name: "logs", Share: 15, WhenFull: spool.DropOldest, Drain: spool.LiveFirst, BackfillShare: 50},
			},
		},
		Routes: []config.Route{{Match: "vitals/+/#", Lane: "vitals"}, {Match: "local/#", Lane: "none"}},
		Upstreams: []bridge.Config{{
			Name: "cloud", URL: "mqtts://broker.example.com:8883", Format: "passthrough", TopicPrefix: "site-7/",
			Username: "ward-3-east", PasswordFile: "/etc/holdfast/secret/pw",
			TLS:   bridge.TLS{CA: "/etc/holdfast/ca.pem", Cert: "/etc/holdfast/c.pem", Key: "/etc/holdfast/k.pem"},
			Lanes: []string{"telemetry", "vitals"}, Window: 64,
		}},
		HTTP:   config.HTTP{Address: "[::1]:9000"},
		Log:    config.Log{Level: "debug", Format: "json"},
		Traces: config.Traces{Endpoint: "https://otel.example.com/v1/traces", Every: 7},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// What print shows loads again, from another folder, as the same.
	var out bytes.Buffer
	if err := config.Print(&out, got); err != nil {
		t.Fatal(err)
	}
	again, _, err := config.Parse("/elsewhere/x.yaml", out.Bytes())
	if err != nil {
		t.Fatalf("what print wrote does not load: %v\n%s", err, out.String())
	}
	if diff := cmp.Diff(got, again); diff != "" {
		t.Errorf("printed and read again (-first +second):\n%s\n%s", diff, out.String())
	}
}

func TestProblems(t *testing.T) {
	const ok = "gateway: { id: g }\ndevices: { anonymous: true }\n" // two lines
	cases := map[string]struct {
		text string
		want []string
	}{
		"unknown key, near": {"gatway: {}\n", []string{`g.yaml:1:1: gatway: unknown key: did you mean "gateway"?`}},
		"unknown key, elsewhere": {
			"data_dir: /x\n",
			[]string{`g.yaml:1:1: data_dir: unknown key here: it belongs to gateway`},
		},
		"unknown key, far": {
			"log: { color: red }\n",
			[]string{`g.yaml:1:8: log.color: unknown key: known here are level, format`},
		},
		"doubled key": {
			"log: { level: info }\nhttp:\n  address: \"127.0.0.1:1\"\nlog: { level: warn }\n",
			[]string{`g.yaml:4:1: log: is given twice, first on line 1: remove one`},
		},
		"section is a value": {
			"log: info\n",
			[]string{`g.yaml:1:6: log: is a single value, has to be a section with the keys level, format`},
		},
		"list is a section": {
			"routes: { match: a }\n",
			[]string{`g.yaml:1:9: routes: is a section, has to be a list: one entry a line, each after a dash`},
		},
		"value is a list": {"gateway: { id: [a] }\n", []string{`g.yaml:1:16: gateway.id: is a list, has to be a text`}},
		"no value": {
			"gateway:\n  id:\n",
			[]string{`g.yaml:2:6: gateway.id: has no value: write a text, or remove the key for its default`},
		},
		"bool in quotes": {
			ok + "upstreams:\n  - { name: c, url: mqtt://127.0.0.1:1, commands: 'yes' }\n",
			[]string{`g.yaml:4:51: upstreams[0].commands: "yes" has to be true or false, without quotes`},
		},
		"number with a unit": {
			ok + "upstreams:\n  - { name: c, url: mqtt://127.0.0.1:1, window: 1k }\n",
			[]string{`g.yaml:4:49: upstreams[0].window: "1k" has to be a whole number without quotes, unit or sign`},
		},
		"size without unit": {
			ok + "spool: { disk_reserve: 64 }\n",
			[]string{`g.yaml:3:24: spool.disk_reserve: "64" has no unit: write a size with its unit: 64KiB, 512MiB, 8GiB`},
		},
		"size with a unit of two meanings": {
			ok + "spool: { disk_reserve: 64MB }\n",
			[]string{`g.yaml:3:24: spool.disk_reserve: "64MB" unit "MB" is not taken, it is MiB here: write a size with its unit: 64KiB, 512MiB, 8GiB`},
		},
		"duration without unit": {
			ok + "spool: { sync_interval: 100 }\n",
			[]string{`g.yaml:3:25: spool.sync_interval: "100" has no unit: write a duration with its unit: 100ms, 30s, 5m, 72h, 7d`},
		},
		"enum": {
			ok + "spool: { durability: fsnyc }\n",
			[]string{`g.yaml:3:22: spool.durability: is "fsnyc": did you mean "fsync"? It has to be one of fsync, interval`},
		},
		"line break in a name": {
			"gateway: { id: \"a\\nb\" }\n",
			[]string{`g.yaml:1:16: gateway.id: has a line break or a control character: write it on one line`},
		},
		"gateway id in a topic": {
			"gateway: { id: a/b }\n",
			[]string{`g.yaml:1:16: gateway.id: "a/b" has to be 1 to 64 letters, digits, '-', '_' or '.', and begin with a letter or digit`},
		},
		"two on one address": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \"127.0.0.1:1883\" }\n  - { name: b, protocol: ws, address: \"localhost:1883\" }\n",
			[]string{`g.yaml:5:39: listeners[1].address: "localhost:1883" is taken by listeners[0].address already: two cannot listen on one address`},
		},
		"listener and http on one address": {
			ok + "http: { address: \"127.0.0.1:1883\" }\n",
			[]string{`g.yaml:3:18: http.address: "127.0.0.1:1883" is taken by listeners[0].address already: two cannot listen on one address`},
		},
		"traces to nowhere": {
			ok + "traces: { endpoint: \"localhost:4318\", every: 0 }\n",
			[]string{
				`g.yaml:3:21: traces.endpoint: is no URL that begins with http:// or https:// and names a host, without user and password: a collector on this machine has http://127.0.0.1:4318/v1/traces`,
				`g.yaml:3:46: traces.every: is 0: 1 tells of every message, 100 of one in a hundred`,
			},
		},
		"two of one name": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \"127.0.0.1:1\" }\n  - { name: a, protocol: ws, address: \"127.0.0.1:2\" }\n",
			[]string{`g.yaml:5:13: listeners[1].name: "a" is the name of listeners[0] already`},
		},
		"no port": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: 127.0.0.1 }\n",
			[]string{`g.yaml:4:41: listeners[0].address: "127.0.0.1" has to be host:port, such as 127.0.0.1:1883, [::1]:1883 or 0.0.0.0:8883 (all addresses)`},
		},
		"no listener": {
			ok + "listeners: []\n",
			[]string{`g.yaml:3:12: listeners: has no entry: devices need at least one; remove the key for one on 127.0.0.1:1883`},
		},
		"tls missing": {ok + "listeners:\n  - { name: a, protocol: mqtts, address: \"127.0.0.1:1\" }\n", []string{
			`g.yaml:4:5: listeners[0].tls.cert: is missing: mqtts needs a certificate (PEM, with its chain)`,
			`g.yaml:4:5: listeners[0].tls.key: is missing: mqtts needs the private key of the certificate (PEM)`,
		}},
		"tls for mqtt": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \"127.0.0.1:1\", tls: { cert: c, key: k } }\n",
			[]string{`g.yaml:4:61: listeners[0].tls: is given for protocol mqtt, which is not encrypted: write protocol mqtts, or remove tls`},
		},
		"client certificates of whom": {
			ok + "listeners:\n  - { name: a, protocol: mqtts, address: \"127.0.0.1:1\", tls: { cert: c, key: k, require_client_cert: true } }\n",
			[]string{`g.yaml:4:102: listeners[0].tls.require_client_cert: needs client_ca: the certificates that devices' certificates are checked with`},
		},
		"other placeholder": { // the registry would not start with it
			"gateway: { id: g }\ndevices: { roles: [{ name: a, publish: [\"dt/{id}/#\"] }] }\n",
			[]string{`g.yaml:2:41: devices.roles[0].publish[0]: "dt/{id}/#" has the level {id}: only {device} stands for something`},
		},
		"anonymous on the network": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \":1883\" }\n",
			[]string{`g.yaml:4:41: listeners[0].address: ":1883" is reached by other machines, and devices.anonymous lets everybody in: listen on 127.0.0.1, or set devices.anonymous to false, or devices.allow_anonymous_on_network to true if the network itself keeps strangers out`},
		},
		"roles": {"gateway: { id: g }\ndevices:\n  roles:\n    - { publish: [\"a/x{device}\", \"a#\", \"\"], subscribe: [$share/g/a] }\n" +
			"    - { name: a b }\n    - { name: c }\n    - { name: c, limits: { bytes_per_second: 5, messages_per_second: -1, connects_per_minute: 1s } }\n", []string{
			`g.yaml:4:7: devices.roles[0].name: is missing: give it a name`,
			`g.yaml:4:19: devices.roles[0].publish[0]: "a/x{device}" has {device} beside other characters: it stands for one whole level, as in cmd/{device}/req/#`,
			`g.yaml:4:34: devices.roles[0].publish[1]: "a#" is no topic filter: '+' stands for one whole level, '#' for all that follow and only at the end`,
			`g.yaml:4:40: devices.roles[0].publish[2]: is empty: write a topic filter, such as "dt/#" or "cmd/{device}/req/#"`,
			`g.yaml:4:57: devices.roles[0].subscribe[0]: "$share/g/a" is a shared subscription: write the filter without $share and the group, it holds for both`,
			`g.yaml:5:15: devices.roles[1].name: "a b" has to be 1 to 64 letters, digits, '-', '_' or '.', and begin with a letter or digit`,
			`g.yaml:7:15: devices.roles[3].name: "c" is the name of devices.roles[2] already`,
			`g.yaml:7:46: devices.roles[3].limits.bytes_per_second: "5" has no unit: write a size with its unit: 64KiB, 512MiB, 8GiB`,
			`g.yaml:7:70: devices.roles[3].limits.messages_per_second: is less than nothing; 0 means no limit`,
			`g.yaml:7:95: devices.roles[3].limits.connects_per_minute: "1s" has to be a whole number without quotes, unit or sign`,
		}},
		"commands": {"gateway: { id: g }\ndevices: { commands: { window: 17, ack_timeout: 1ms, history: 0, max_pending: 0 } }\n", []string{
			`g.yaml:2:32: devices.commands.window: has to be 1 to 16: the commands of one device that are under way at once`,
			`g.yaml:2:49: devices.commands.ack_timeout: "1ms" is outside of 1s to 10m: it is how long a device may take to acknowledge a command`,
			`g.yaml:2:63: devices.commands.history: "0" is outside of 1m to 8760h: it is how long a command can be looked at after its end`,
			`g.yaml:2:79: devices.commands.max_pending: has to be 1 to 1000000: the commands of all devices that have no end yet`,
		}},
		"revoked by whom": {
			ok + "listeners:\n  - { name: a, protocol: mqtts, address: \"127.0.0.1:1\", tls: { cert: c, key: k, crl: x } }\n",
			[]string{`g.yaml:4:86: listeners[0].tls.crl: needs client_ca: it lists which of the certificates that client_ca signed are revoked`},
		},
		"crl without tls": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \"127.0.0.1:1\", tls: { client_ca: c, crl: x } }\n",
			[]string{`g.yaml:4:61: listeners[0].tls: is given for protocol mqtt, which is not encrypted: write protocol mqtts, or remove tls`},
		},
		"no connections": {
			ok + "listeners:\n  - { name: a, protocol: mqtt, address: \"127.0.0.1:1\", max_connections: -1 }\n",
			[]string{`g.yaml:4:73: listeners[0].max_connections: has to be 0 to 1000000; 0 means no limit of its own`},
		},
		"shares": {
			ok + "spool:\n  lanes:\n    - { name: telemetry, share: 60 }\n    - { name: b, share: 50 }\n",
			[]string{`g.yaml:5:5: spool.lanes: the shares add up to 110 percent: at most 100 can be promised`},
		},
		"no share left": {
			ok + "spool:\n  lanes:\n    - { name: telemetry, share: 100 }\n    - { name: b }\n",
			[]string{`g.yaml:6:7: spool.lanes[1].share: is missing, and the other lanes leave nothing of the 100 percent: lower theirs`},
		},
		"reserved lane": {
			ok + "spool: { lanes: [{ name: telemetry }, { name: system }] }\n",
			[]string{`g.yaml:3:47: spool.lanes[1].name: "system" is reserved: choose another name`},
		},
		"small lane": {
			ok + "spool: { lanes: [{ name: telemetry, max_bytes: 1KiB }] }\n",
			[]string{`g.yaml:3:48: spool.lanes[0].max_bytes: "1KiB" is less than 1MiB; 0 means no limit`},
		},
		"when_full": {
			ok + "spool: { lanes: [{ name: telemetry, when_full: drop-oldest }] }\n",
			[]string{`g.yaml:3:48: spool.lanes[0].when_full: is "drop-oldest": did you mean "drop_oldest"? It has to be one of drop_oldest, reject`},
		},
		"drain": {
			ok + "spool: { lanes: [{ name: telemetry, drain: newest_first }, { name: b, backfill_share: 0 }, { name: c, backfill_share: 91 }] }\n",
			[]string{
				`g.yaml:3:44: spool.lanes[0].drain: is "newest_first": has to be one of in_order, live_first`,
				`g.yaml:3:87: spool.lanes[1].backfill_share: has to be 1 to 90: the percentage of the lane's bytes that a backlog gets while newer messages flow`,
				`g.yaml:3:119: spool.lanes[2].backfill_share: has to be 1 to 90: the percentage of the lane's bytes that a backlog gets while newer messages flow`,
			},
		},
		"no lane for the rest": {
			ok + "spool: { lanes: [{ name: a }] }\n",
			[]string{`g.yaml: routes: messages that no route matches go to the lane telemetry, which spool.lanes does not have: name a lane so, or end the routes with { match: "#", lane: … }`},
		},
		"route": {ok + "routes:\n  - { match: a#, lane: alrm }\n  - { match: $share/g/a, lane: bulk }\n  - {}\n", []string{
			`g.yaml:4:14: routes[0].match: "a#" is no topic filter: '+' stands for one whole level, '#' for all that follow and only at the end`,
			`g.yaml:4:24: routes[0].lane: there is no lane "alrm": did you mean "alarm"? spool.lanes has alarm, telemetry, bulk, none`,
			`g.yaml:5:14: routes[1].match: "$share/g/a" is a shared subscription: write the filter without $share and the group`,
			`g.yaml:6:5: routes[2].match: is missing: write a topic filter, such as "alarm/#" or "dt/+/+/temperature"`,
			`g.yaml:6:5: routes[2].lane: is missing: write one of alarm, telemetry, bulk, none`,
		}},
		"upstream url": {ok + "upstreams:\n  - { name: a, url: nats://h:1 }\n  - { name: b, url: tcp://h:1 }\n  - { name: c, url: h }\n  - { name: d }\n  - { name: e, url: \"mqtts://h:70000\" }\n  - { name: f, url: mqtts://h/topic }\n", []string{
			`g.yaml:4:21: upstreams[0].url: nats upstreams are not in this version: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:5:21: upstreams[1].url: scheme tcp is not taken: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:6:21: upstreams[2].url: is not a URL: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:7:5: upstreams[3].url: is missing: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:8:21: upstreams[4].url: has a port that is not 1 to 65535: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:9:21: upstreams[5].url: has something after the port: write mqtts://host:8883 or mqtt://host:1883`,
		}},
		"upstream lanes": {ok + "upstreams:\n  - { name: a, url: mqtts://h, lanes: [alarm, nope, alarm, system] }\n  - { name: a, url: mqtts://h, lanes: [] }\n", []string{
			`g.yaml:4:47: upstreams[0].lanes[1]: there is no lane "nope": spool.lanes has alarm, telemetry, bulk`,
			`g.yaml:4:53: upstreams[0].lanes[2]: "alarm" is given twice: remove one`,
			`g.yaml:4:60: upstreams[0].lanes[3]: the lane system goes to every upstream by itself: remove it`,
			`g.yaml:5:13: upstreams[1].name: "a" is the name of upstreams[0] already`,
			`g.yaml:5:39: upstreams[1].lanes: has no entry: write lanes, or remove the key for all`,
		}},
		"upstream rest": {ok + "upstreams:\n  - { name: a, url: mqtt://127.0.0.1:9, tls: { ca: x }, topic_prefix: p, window: 0 }\n  - { name: b, url: mqtts://h, format: json, tls: { cert: x }, password_file: x }\n", []string{
			`g.yaml:4:46: upstreams[0].tls: is given, but the url begins with mqtt://, which is not encrypted: write mqtts://, or remove tls`,
			`g.yaml:4:71: upstreams[0].topic_prefix: is for format passthrough only: remove it, or change the format`,
			`g.yaml:4:82: upstreams[0].window: has to be 1 to 16384: the sends that may wait for their acknowledgement`,
			`g.yaml:5:40: upstreams[1].format: is "json": has to be one of batch, passthrough, cloudevents`,
			`g.yaml:5:51: upstreams[1].tls.key: is missing: a certificate needs its private key`,
			`g.yaml:5:79: upstreams[1].password_file: needs a username: MQTT 3.1.1 has no password without one`,
		}},
		"upstream urls": {ok + "upstreams:\n  - { name: a, url: mqtts://h, urls: [mqtts://i] }\n  - { name: b, urls: [] }\n  - { name: c, urls: [mqtts://h, nats://i, mqtts://h, mqtt://127.0.0.1:9] }\n" +
			"  - { name: d, urls: [\"mqtts://u:secret@h\", mqtt://localhost], tls: { ca: x } }\n", []string{
			`g.yaml:4:38: upstreams[0].urls: stands beside url: write url for one address, urls for several, not both`,
			`g.yaml:5:22: upstreams[1].urls: has no entry: write addresses, or url with one`,
			`g.yaml:6:22: upstreams[2].urls: mixes mqtt:// and mqtts://: whoever blocks the encrypted ones would have everything in clear; write one of the two`,
			`g.yaml:6:34: upstreams[2].urls[1]: nats upstreams are not in this version: write mqtts://host:8883 or mqtt://host:1883`,
			`g.yaml:6:44: upstreams[2].urls[2]: is given twice: remove one`,
			`g.yaml:7:23: upstreams[3].urls[0]: holds a user name or password: use username and password_file, a URL ends up in logs`,
			`g.yaml:7:45: upstreams[3].urls[1]: is listeners[0] of this gateway: every message would come back to it`,
			`g.yaml:7:69: upstreams[3].tls: is given, but the url begins with mqtt://, which is not encrypted: write mqtts://, or remove tls`,
		}},
		"upstream budget": {ok + "upstreams:\n  - { name: a, url: mqtts://h, budget: { bytes_per_second: 100B, bytes_per_day: 1KiB, windows: [] } }\n" +
			"  - { name: b, url: mqtts://h, budget: { bytes_per_second: 6000, windows: [{ cron: \"0 22 * *\", for: 8 }, { cron: \"0 22 * * *\" }, { cron: \"0 0 30 feb *\", for: 10d }] } }\n", []string{
			`g.yaml:4:60: upstreams[0].budget.bytes_per_second: has to be at least 256B, or 0 for no limit: less does not carry a keep-alive and a message`,
			`g.yaml:4:81: upstreams[0].budget.bytes_per_day: has to be at least 64KiB, or 0 for no limit: connections and keep-alives alone take that`,
			`g.yaml:4:96: upstreams[0].budget.windows: has no entry: nothing would ever be sent; write windows, or remove the key for always`,
			`g.yaml:5:60: upstreams[1].budget.bytes_per_second: "6000" has no unit: write a size with its unit: 64KiB, 512MiB, 8GiB`,
			`g.yaml:5:84: upstreams[1].budget.windows[0].cron: does not have five fields: write five fields, minute hour day month weekday: "0 22 * * *", or "TZ=Europe/Berlin 0 22 * * *"`,
			`g.yaml:5:101: upstreams[1].budget.windows[0].for: "8" has no unit: write a duration with its unit: 100ms, 30s, 5m, 72h, 7d`,
			`g.yaml:5:106: upstreams[1].budget.windows[1].for: has to be 1m to 168h`,
			`g.yaml:5:138: upstreams[1].budget.windows[2].cron: never comes: there is no such day`,
			`g.yaml:5:159: upstreams[1].budget.windows[2].for: has to be 1m to 168h`,
		}},
		"upstream is this gateway": {
			ok + "upstreams: [{ name: a, url: mqtt://localhost }]\n",
			[]string{`g.yaml:3:29: upstreams[0].url: is listeners[0] of this gateway: every message would come back to it`},
		},
		"tag":      {"gateway: { id: !secret abc }\n", []string{`g.yaml:1:16: gateway.id: YAML tags are not supported here: write the value alone`}},
		"merge":    {"log: &l { level: info }\nhttp: { <<: *l }\n", []string{`g.yaml:2:9: http: merge keys (<<) are not supported: write the keys out`}},
		"two docs": {"log: { level: info }\n---\nlog: { level: warn }\n", []string{`g.yaml:2:1: holds more than one document: remove the second '---'`}},
		"tab":      {"log:\n\tlevel: info\n", []string{"g.yaml:2:1: is not YAML: found character that cannot start any token (indent with spaces, not tabs; a value that begins with @, ` or % needs quotes)"}},
		"list":     {"- a\n", []string{`g.yaml:1:1: is a list, has to be a section with the keys gateway, listeners, devices, spool, routes, upstreams, http, log, traces`}},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, problems(t, tc.text)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAnEmptySectionMeansItsDefaults(t *testing.T) {
	want := parse(t, minimal)
	got := parse(t, minimal+"listeners:\n#  - { name: x }\nspool:\nroutes:\nupstreams:\nhttp:\nlog:\n")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAliasesAreFollowed(t *testing.T) {
	got := parse(t, minimal+`
upstreams:
  - { name: a, url: mqtts://a, tls: &pki { ca: /ca.pem } }
  - { name: b, url: mqtts://b, tls: *pki }
`)
	if got.Upstreams[1].TLS.CA != "/ca.pem" {
		t.Errorf("tls of the second upstream = %+v", got.Upstreams[1].TLS)
	}
}

// A file may be a bomb: small to read, endless to follow.
func TestBombsEnd(t *testing.T) {
	wide := "x: &a [" + strings.Repeat("alarm,", 4000) + "alarm]\n"
	many := "upstreams:\n" + strings.Repeat("  - { name: a, url: mqtts://h, lanes: *a }\n", 4000)
	for name, text := range map[string]string{
		"aliases":    wide + many,
		"itself":     "routes: &a\n  - *a\n",
		"deep":       strings.Repeat("[", 9000),
		"large":      "# " + strings.Repeat("x", 2<<20),
		"long value": "gateway: { id: " + strings.Repeat("x", 1<<19) + " }\n",
		"entries":    "routes: [" + strings.Repeat("{},", 5000) + "]\n",
	} {
		t.Run(name, func(t *testing.T) {
			ps := problems(t, text)
			if len(ps) == 0 {
				t.Fatal("no problem told")
			}
			if total := len(strings.Join(ps, "\n")); total > 64<<10 {
				t.Errorf("%d problems in %d bytes: too much to read", len(ps), total)
			}
		})
	}
}

// What may be a secret is never repeated, wherever people put it.
func TestSecretsAreNotEchoed(t *testing.T) {
	const secret = "hunter2+correct-horse"
	for name, text := range map[string]string{
		"as an unknown key's value": "upstreams:\n  - { name: a, password: " + secret + " }\n",
		"in the url":                "upstreams:\n  - { name: a, url: \"mqtts://u:" + secret + "@h:1\" }\n",
		"as the whole url":          "upstreams:\n  - { name: a, url: \"" + secret + "\" }\n",
		"in a broken url":           "upstreams:\n  - { name: a, url: \"mqtts://u:" + secret + "@h:%zz\" }\n",
		"as the user name":          "upstreams:\n  - { name: a, url: mqtts://h, username: [" + secret + "] }\n",
		"as an alias":               "upstreams:\n  - { name: a, password_file: *" + secret + " }\n",
		"as a tag":                  "upstreams:\n  - { name: a, password_file: !" + secret + " x }\n",
		"as a key":                  "upstreams:\n  - { \"" + secret + "\": x }\n",
		"where YAML ends":           "upstreams:\n  - { name: a, password_file: \"" + secret + "\n",
		"as a multi-line key":       "listeners:\n  - { name: a, protocol: mqtts, address: \"127.0.0.1:1\", tls: { key: \"" + secret + "\\n\" } }\n",
	} {
		t.Run(name, func(t *testing.T) {
			ps := problems(t, text)
			if len(ps) == 0 {
				t.Fatal("no problem told")
			}
			for _, p := range ps {
				if strings.Contains(p, "hunter2") {
					t.Errorf("the secret is in: %s", p)
				}
			}
		})
	}
}

func TestWarnings(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"said twice, meant never": {
			"gateway: { id: g }\ndevices: { allow_anonymous_on_network: true }\n",
			"g.yaml:2:40: warning: devices.allow_anonymous_on_network: has no effect while devices.anonymous is false",
		},
		"tokens in clear": {
			minimal + "http: { address: \"0.0.0.0:8080\" }\n",
			"g.yaml:3:18: warning: http.address: 0.0.0.0:8080 is reached by other machines, and HTTP is not encrypted: whoever listens on the way reads the tokens; " +
				"listen on 127.0.0.1 and put a reverse proxy with TLS before it, or come through ssh -L 8080:127.0.0.1:8080",
		},
		"publish as the gateway": {
			"gateway: { id: g }\ndevices: { roles: [{ name: a, publish: [\"+/x\", gw/a/state] }] }\n",
			`g.yaml:2:48: warning: devices.roles[0].publish[1]: "gw/a/state" has no effect: no device may publish there, only Holdfast itself does`,
		},
		"publish as the broker": {
			"gateway: { id: g }\ndevices: { roles: [{ name: a, publish: [$SYS/x, \"#\"] }] }\n",
			`g.yaml:2:41: warning: devices.roles[0].publish[0]: "$SYS/x" has no effect: no device may publish there, only Holdfast itself does`,
		},
		"publish commands": {
			"gateway: { id: g }\ndevices: { roles: [{ name: a, publish: [\"cmd/+/req/#\"], subscribe: [\"cmd/+/req/#\"] }] }\n",
			`g.yaml:2:41: warning: devices.roles[0].publish[0]: "cmd/+/req/#" has no effect: no device may publish there, only Holdfast itself does`,
		},
		"plain network": {
			"gateway: { id: g }\ndevices: { anonymous: true, allow_anonymous_on_network: true }\nlisteners:\n  - { name: a, protocol: ws, address: \"0.0.0.0:1\" }\n",
			"g.yaml:4:26: warning: listeners[0].protocol: ws on 0.0.0.0:1 is not encrypted: others on the network can read and change what devices send, their secrets too; wss is the encrypted one",
		},
		"dead route": {
			minimal + "routes:\n  - { match: \"a/#\", lane: bulk }\n  - { match: a/b, lane: alarm }\n",
			`g.yaml:5:14: warning: routes[1].match: "a/b" never matches: routes[0] comes first and takes it all`,
		},
		"interval":    {minimal + "spool: { durability: interval }\n", "g.yaml:3:22: warning: spool.durability: interval: a power cut takes what was acknowledged in the last 100ms"},
		"unread lane": {minimal + "upstreams: [{ name: a, url: mqtts://h, lanes: [alarm, bulk] }]\n", `g.yaml: warning: spool.lanes[1].name: lane "telemetry" goes to no upstream: its messages stay until max_age or max_bytes`},
		"plain uplink": {
			minimal + "upstreams: [{ name: a, url: mqtt://h }]\n",
			"g.yaml:3:29: warning: upstreams[0].url: mqtt:// is not encrypted: others on the way can read and change what is sent, the password too; mqtts:// is the encrypted one",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, warnings, err := config.Parse("g.yaml", []byte(tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if len(warnings) != 1 || warnings[0].String() != tc.want {
				t.Errorf("warnings:\n%v\nwant:\n%s", warnings, tc.want)
			}
		})
	}
}

func TestUnits(t *testing.T) {
	sizes := map[string]int64{"0": 0, "1B": 1, "64KiB": 64 << 10, "512MiB": 512 << 20, "8GiB": 8 << 30, "2TiB": 2 << 40, "1.5KiB": 1536, "10 MiB": 10 << 20}
	for s, want := range sizes {
		if got, err := config.ParseSize(s); err != nil || got != want {
			t.Errorf("size %q = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "1", "-1MiB", "1MB", "1.MiB", ".5MiB", "1.3B", "MiB", "1MiB2", "9999999999TiB", "1e3MiB", "0x1MiB", "1 / 2MiB"} {
		if got, err := config.ParseSize(s); err == nil {
			t.Errorf("size %q = %d, want an error", s, got)
		}
	}
	durations := map[string]time.Duration{
		"0": 0, "100ms": 100 * time.Millisecond, "30s": 30 * time.Second, "1h30m": 90 * time.Minute,
		"7d": 168 * time.Hour, "1d12h": 36 * time.Hour, "1.5h": 90 * time.Minute, "250us": 250 * time.Microsecond, "720h": 720 * time.Hour,
	}
	for s, want := range durations {
		if got, err := config.ParseDuration(s); err != nil || got != want {
			t.Errorf("duration %q = %s, %v; want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", "1", "-1s", "1m1h", "1s1s", "s", "1y", "1e9s", "99999999999h", "1h30", "0.1us"} {
		if got, err := config.ParseDuration(s); err == nil {
			t.Errorf("duration %q = %s, want an error", s, got)
		}
	}
}

func FuzzUnitsComeBack(f *testing.F) {
	f.Add(int64(1536), int64(90*time.Minute))
	f.Fuzz(func(t *testing.T, size, dur int64) {
		size, dur = max(size, -size, 0)&(1<<62-1), max(dur, -dur, 0)%int64(24*365*100*time.Hour)
		dur -= dur % int64(time.Microsecond)
		if got, err := config.ParseSize(config.FormatSize(size)); err != nil || got != size {
			t.Errorf("size %d -> %q -> %d, %v", size, config.FormatSize(size), got, err)
		}
		if got, err := config.ParseDuration(config.FormatDuration(time.Duration(dur))); err != nil || got != time.Duration(dur) {
			t.Errorf("duration %d -> %q -> %d, %v", dur, config.FormatDuration(time.Duration(dur)), got, err)
		}
	})
}

func TestCovers(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want bool
	}{
		{"#", "a/b", true},
		{"#", "+/a", true},
		{"a/#", "a", true},
		{"a/#", "a/b/#", true},
		{"a/+", "a/b", true},
		{"a/+", "a/+", true},
		{"a/b", "a/+", false},
		{"a/+", "a/#", false},
		{"a/#", "#", false},
		{"+/b", "a/b", true},
		{"#", "$SYS/x", false},
		{"+/x", "$SYS/x", false},
		{"$SYS/#", "$SYS/x", true},
		{"a", "a/b", false},
		{"+", "a/b", false},
	} {
		if got := config.Covers(tc.a, tc.b); got != tc.want {
			t.Errorf("covers(%q, %q) = %v, want %v", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestFilesThatAreNamedAreLookedAt(t *testing.T) {
	dir := t.TempDir()
	write := func(name, data string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("open", "secret\n", 0o644)
	write("empty", "\n", 0o600)
	write("two", "a\nb\n", 0o600)
	write("good", "secret\n", 0o600)
	write("not-pem", "hello", 0o600)
	write("g.yaml", minimal+`
listeners:
  - { name: tls, protocol: mqtts, address: "127.0.0.1:1883", tls: { cert: not-pem, key: not-pem, client_ca: not-pem } }
upstreams:
  - { name: a, url: mqtts://h, username: u, password_file: hunter2 }
  - { name: b, url: mqtts://h, username: u, password_file: empty }
  - { name: c, url: mqtts://h, username: u, password_file: two }
  - { name: d, url: mqtts://h, username: u, password_file: open, tls: { ca: missing.pem } }
  - { name: e, url: mqtts://h, username: u, password_file: good }
  - { name: f, url: mqtts://h, username: u, password_file: . }
`, 0o600)
	_, _, err := config.Load(filepath.Join(dir, "g.yaml"))
	if err == nil {
		t.Fatal("want problems")
	}
	text := strings.ReplaceAll(err.Error(), dir+"/", "")
	want := []string{
		`listeners[0].tls.cert: certificate and key do not work together, files`,
		`listeners[0].tls.client_ca: file "not-pem" holds no certificate (PEM)`,
		`upstreams[0].password_file: the file cannot be read: no such file or directory`,
		`upstreams[1].password_file: the file is empty`,
		`upstreams[2].password_file: the file has more than one line`,
		`upstreams[3].tls.ca: file "missing.pem" cannot be read: no such file or directory`,
		`upstreams[5].password_file: the file is not a regular file`,
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("missing: %s", w)
		}
	}
	if strings.Contains(text, "hunter2") || strings.Contains(text, "upstreams[4]") || strings.Count(text, "\n")+1 != len(want) {
		t.Errorf("problems:\n%s", text)
	}
}

// A list of revoked certificates has to be one, in force, and made by who signed the certificates.
func TestTheListOfRevokedCertificatesIsLookedAt(t *testing.T) {
	dir := t.TempDir()
	write := func(name, kind string, der []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	for _, ca := range []string{"ours", "theirs"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: ca}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour * 1000),
			BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte(ca),
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		write(ca+".crt", "CERTIFICATE", der)
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(ca+".key", "PRIVATE KEY", raw)
		for name, next := range map[string]time.Time{ca + ".crl": now.Add(time.Hour), ca + "-old.crl": now.Add(-time.Minute)} {
			list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
				Number: big.NewInt(1), ThisUpdate: now.Add(-time.Hour), NextUpdate: next,
			}, tmpl, key)
			if err != nil {
				t.Fatal(err)
			}
			write(name, "X509 CRL", list)
		}
	}
	for crl, want := range map[string]string{
		"ours.crl":     "",
		"ours-old.crl": "warning: listeners[0].tls.crl: the list was to be renewed by",
		"theirs.crl":   `listeners[0].tls.crl: none of the certificates in client_ca has signed the list in file "theirs.crl"`,
		"ours.crt":     `listeners[0].tls.crl: file "ours.crt" holds no list of revoked certificates (CRL, PEM or DER)`,
		"none.crl":     `listeners[0].tls.crl: file "none.crl" cannot be read: no such file`,
	} {
		text := minimal + `listeners: [{ name: a, protocol: mqtts, address: "127.0.0.1:1",
  tls: { cert: ours.crt, key: ours.key, client_ca: ours.crt, crl: ` + crl + " } }]\n"
		if err := os.WriteFile(filepath.Join(dir, "g.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, warnings, err := config.Load(filepath.Join(dir, "g.yaml"))
		var got string
		switch {
		case err != nil:
			got = err.Error()
		case len(warnings) > 0:
			got = warnings.Error()
		}
		got = strings.ReplaceAll(got, dir+"/", "")
		if (want == "") != (got == "") || !strings.Contains(got, want) || strings.Contains(got, "\n") {
			t.Errorf("%s: %q, want %q", crl, got, want)
		}
	}
}

func TestASecretForEverybodyIsWarnedOf(t *testing.T) {
	dir := t.TempDir()
	secret, file := filepath.Join(dir, "pw"), filepath.Join(dir, "g.yaml")
	text := minimal + "upstreams: [{ name: a, url: mqtts://h, username: u, password_file: pw }]\n"
	if err := errors.Join(os.WriteFile(secret, []byte("x\n"), 0o600), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, warnings, err := config.Load(file); err != nil || len(warnings) != 0 {
		t.Errorf("mode 0600: %v, %v", warnings, err)
	}
	if err := os.Chmod(secret, 0o644); err != nil {
		t.Fatal(err)
	}
	_, warnings, err := config.Load(file)
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0].Text, "(mode 0644): chmod 600 it") {
		t.Errorf("mode 0644: %v, %v", warnings, err)
	}
}

func TestAFileThatIsNotThere(t *testing.T) {
	_, _, err := config.Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error = %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", minimal, "gateway: {id: a\n", "&a [*a]", "? [a]: b", "a: !!binary x", "routes: [{match: \"a/#\", lane: none}]", "--- \n...\n---", "\x00", "<<: *x",
		"spool: { lanes: [{ name: telemetry, share: 3, max_age: 7d, max_bytes: 1.5GiB }] }\ndevices: { anonymous: true }",
		"upstreams: [{ name: a, url: mqtts://h:1, format: passthrough, topic_prefix: x/, lanes: [alarm] }]\ndevices: { anonymous: true }",
		"listeners: [{ name: a, protocol: wss, address: \"0.0.0.0:1\", tls: { cert: a, key: b } }]",
	} {
		f.Add([]byte(s))
	}
	if example, err := os.ReadFile("../../configs/gateway.yaml"); err == nil {
		f.Add(example)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, _, err := config.Parse("/x/g.yaml", data)
		if err != nil {
			if c != nil || err.Error() == "" {
				t.Errorf("config %v with error %q", c, err)
			}
			return
		}
		var out bytes.Buffer
		if err := config.Print(&out, c); err != nil {
			t.Fatal(err)
		}
		again, _, err := config.Parse("/y/g.yaml", out.Bytes())
		if err != nil {
			t.Fatalf("what print wrote does not load: %v\n%s", err, out.String())
		}
		if diff := cmp.Diff(c, again); diff != "" {
			t.Errorf("printed and read again (-first +second):\n%s\n%s", diff, out.String())
		}
	})
}

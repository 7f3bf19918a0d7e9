package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/testkit"
)

// A broker stands for the gateway, and mosquitto_pub for the cloud. What it sends is retained, so that devices find it.
func TestCommands(t *testing.T) {
	broker := testkit.StartMosquitto(t).Addr
	host, port, _ := strings.Cut(broker, ":")
	pub, err := exec.LookPath("mosquitto_pub")
	if err != nil {
		t.Skip(err)
	}
	for topic, payload := range map[string]string{
		"cmd/sim-00001/req/a/echo": "hello", "cmd/sim-00002/req/b/open-valve": `{"n":1}`, "cmd/sim-00002/req/c/reject": `{}`,
	} {
		if out, err := exec.CommandContext(t.Context(), pub, "-h", host, "-p", port, "-q", "1", "-r", "-t", topic, "-m", payload).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	args := []string{"--broker", "mqtt://" + broker, "--devices", "3", "--no-samples", "--commands", "--execution", "1ms", "--behaviour", "open-valve=fail", "--duration", "300ms"}
	code, stdout, stderr := call(t.Context(), append(args, "--json")...)
	var r struct {
		Report struct {
			Commands firmwaresim.CommandCounts `json:"commands"`
		} `json:"report"`
		Verdict  firmwaresim.CommandVerdict  `json:"command_verdict"`
		Commands []firmwaresim.CommandRecord `json:"commands"`
	}
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v\n%s", err, stdout)
	}
	if code != exitDone || stderr != "" || r.Report.Commands.Answered != 3 || r.Verdict.Received != 3 || r.Verdict.Executed != 2 || len(r.Commands) != 3 {
		t.Fatalf("exit code %d, %s\n%s", code, stdout, stderr)
	}
	outcome := map[string]string{}
	for _, c := range r.Commands {
		outcome[c.ID] = c.Outcome
		if c.Received != 1 || !c.Acknowledged || c.Open {
			t.Errorf("%+v", c)
		}
	}
	if outcome["a"] != "succeeded" || outcome["b"] != "failed" || outcome["c"] != "rejected" {
		t.Errorf("outcomes %v", outcome)
	}
	code, stdout, _ = call(t.Context(), append(args, "--sleep", "--awake", "50ms", "--period", "100ms")...)
	if code != exitDone || !strings.Contains(stdout, "commands           3 received") {
		t.Errorf("exit code %d\n%s", code, stdout)
	}
}

// A gateway that turns commands round is found out.
func TestCommandsOutOfOrder(t *testing.T) {
	sent := false
	var s *mqtttest.Server
	s = mqtttest.New(t, mqtttest.Script{Frame: func(client string, f []byte) bool {
		if mqtt.Type(f[0]>>4) == mqtt.TypeSubscribe && !sent {
			sent = true
			for id, payload := range []string{`{"n":2}`, `{"n":1}`} {
				s.Send(client, mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 1, ID: uint16(id + 1), Topic: []byte("cmd/sim-00001/req/" + string(rune('a'+id)) + "/set"), Payload: []byte(payload)}))
			}
		}
		return true
	}})
	code, stdout, stderr := call(t.Context(), "--broker", "mqtt://"+s.Addr, "--devices", "1", "--no-samples", "--commands", "--execution", "-1s", "--duration", "200ms")
	if code != exitFailed || !strings.Contains(stderr, "0 commands were executed twice and 1 came out of order") || !strings.Contains(stdout, "sim-00001 b: n=1 came first after n=2") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestSecrets(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{Connect: func(c *mqtt.Connect) mqtt.Connack {
		if c.Username != c.ClientID || string(c.Password) != "of, "+c.ClientID {
			return mqtt.Connack{Reason: mqtt.BadUsernameOrPassword}
		}
		return mqtt.Connack{}
	}})
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"--broker", "mqtt://" + s.Addr, "--devices", "2", "--qos", "1", "--rate", "100", "--messages", "5", "--secrets"}
	good := file("good", "id,secret\nsim-00001,\"of, sim-00001\"\nsim-00002,\"of, sim-00002\",more\n")
	if code, stdout, stderr := call(t.Context(), append(args, good)...); code != exitDone || !strings.Contains(stdout, "acknowledged       10 messages") || !strings.Contains(stdout, "errors             none") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	for name, want := range map[string]string{
		file("short", "sim-00001,x\n"):              "no line for sim-00002",
		file("line", "sim-00001,x\nsim-00002\n"):    "line:2: not of the form id,secret",
		file("twice", "a,x\n\na,y\n"):               "twice:3: device a stands there twice",
		file("quotes", "a,\"x\n"):                   "quotes",
		filepath.Join(dir, "there is none"):         "no such file",
		good + "\x00--password-file\x00" + good:     "which?",
		good + "\x00--execution\x001s":              "--commands",
		good + "\x00--awake\x001s":                  "--sleep",
		good + "\x00--cert-dir\x00" + dir:           "mqtts://",
		good + "\x00--commands\x00--behaviour\x00x": "NAME=WHAT",
		good + "\x00--behaviour\x00x=dance":         "dance",
	} {
		if code, _, stderr := call(t.Context(), append(args, strings.Split(name, "\x00")...)...); code != exitUsage || !strings.Contains(stderr, want) || strings.Contains(stderr, "of, sim") {
			t.Errorf("%q: exit code %d, stderr lacks %q:\n%s", name, code, want, stderr)
		}
	}
}

func TestCertDir(t *testing.T) {
	dir := t.TempDir()
	pair, ca := selfSigned(t, dir)
	roots := x509.NewCertPool()
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(leaf)
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for ext, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, ".key": {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(filepath.Join(dir, "sim-00001"+ext), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := mqtttest.New(t, mqtttest.Script{TLS: &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: roots, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13,
	}})
	args := []string{"--broker", "mqtts://" + s.Addr, "--ca", ca, "--cert-dir", dir, "--qos", "1", "--rate", "100"}
	if code, stdout, stderr := call(t.Context(), append(args, "--devices", "1", "--messages", "5")...); code != exitDone || !strings.Contains(stdout, "acknowledged       5 messages") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := call(t.Context(), append(args, "--devices", "1", "--first", "2", "--duration", "100ms", "--drain", "-1s")...); code != exitFailed || !strings.Contains(stdout+stderr, "no such file") {
		t.Errorf("without a certificate: exit code %d\n%s%s", code, stdout, stderr)
	}
	if code, _, stderr := call(t.Context(), append(args, "--cert", "x")...); code != exitUsage || !strings.Contains(stderr, "which?") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

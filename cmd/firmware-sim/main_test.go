package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
)

// call runs the program and gives its exit code and what it printed.
func call(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = run(ctx, args, &out, &err)
	return code, out.String(), err.String()
}

func TestWrongUsage(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"nothing", nil, []string{"--broker is missing", "mqtt://127.0.0.1:1883"}},
		{"no such flag", []string{"--broken", "x"}, []string{"not defined: -broken"}},
		{"an argument", []string{"mqtt://h"}, []string{`argument "mqtt://h"`, "--broker mqtt://h"}},
		{"not a broker", []string{"--broker", "localhost:1883"}, []string{"mqtt://host:port"}},
		{"all at once", []string{"--broker", "mqtt://h", "--version", "3", "--qos", "4", "--devices", "0"}, []string{`--version "3"`, `--qos "4"`, "--devices 0"}},
		{"the fleet's own checks", []string{"--broker", "mqtt://h", "--profile", "toaster", "--size", "5"}, []string{`profile "toaster"`, "size 5"}},
		{"CA without TLS", []string{"--broker", "mqtt://h", "--ca", "x"}, []string{"mqtts://"}},
		{"no CA file", []string{"--broker", "mqtts://h", "--ca", filepath.Join(dir, "none")}, []string{"--ca", "no such file"}},
		{"no password file", []string{"--broker", "mqtt://h", "--username", "u", "--password-file", filepath.Join(dir, "none")}, []string{"--password-file", "no such file"}},
		{"verify flags alone", []string{"--broker", "mqtt://h", "--verify-filter", "a/#"}, []string{"--verify URL"}},
		{"wrong filter", []string{"--broker", "mqtt://h", "--verify-filter", "a#"}, []string{"not a topic filter"}},
		{"wrong upstream", []string{"--broker", "mqtt://h", "--verify", "ftp://h"}, []string{"--verify"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, stdout, stderr := call(t.Context(), c.args...)
			if code != exitUsage || stdout != "" {
				t.Errorf("exit code %d, stdout %q", code, stdout)
			}
			for _, want := range append(c.want, "--help") {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr lacks %q:\n%s", want, stderr)
				}
			}
		})
	}
}

func TestHelpShowsEveryFlag(t *testing.T) {
	code, stdout, stderr := call(t.Context(), "--help")
	if code != exitDone || stderr != "" {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
	var shown []string
	for _, g := range groups {
		shown = append(shown, g.flags...)
	}
	flags(new(options)).VisitAll(func(f *flag.Flag) {
		if !slices.Contains(shown, f.Name) || !strings.Contains(stdout, "\n  --"+f.Name+" ") {
			t.Errorf("help lacks --%s", f.Name)
		}
		if value, text := flag.UnquoteUsage(f); value != "" && !strings.HasPrefix(text, value+": ") {
			t.Errorf("--%s: text does not begin with its value %s: %q", f.Name, value, text)
		}
	})
	for _, line := range strings.Split(stdout, "\n") {
		if len(line) > 125 {
			t.Errorf("line of %d characters: %s", len(line), line)
		}
	}
}

func TestNobodyThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	code, stdout, stderr := call(t.Context(), "--broker", "mqtt://"+l.Addr().String(), "--duration", "50ms", "--drain", "-1s")
	if code != exitFailed || !strings.Contains(stderr, "connection refused") || !strings.Contains(stdout, "failed attempts") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestReport(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{})
	code, stdout, stderr := call(t.Context(), "--broker", "mqtt://"+s.Addr, "--version", "4", "--devices", "3", "--rate", "100", "--messages", "20", "--qos", "1", "--flaky", "0.1")
	if code != exitDone || stderr != "" {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	for _, want := range []string{"published          60 messages", "acknowledged       60 messages", "p99.9", "errors             none"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("report lacks %q:\n%s", want, stdout)
		}
	}
}

func TestJSON(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{})
	code, stdout, stderr := call(t.Context(), "--broker", "mqtt://"+s.Addr, "--devices", "2", "--rate", "0", "--messages", "30", "--qos", "2", "--size", "200", "--json")
	var r struct {
		Report struct {
			Published    uint64 `json:"published"`
			Acknowledged uint64 `json:"acknowledged"`
			Bytes        uint64 `json:"payload_bytes"`
			Latency      struct {
				P99 int64 `json:"p99_ns"`
			} `json:"ack_latency"`
		} `json:"report"`
		Verdict *struct{} `json:"verdict"`
	}
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v\n%s", err, stdout)
	}
	if code != exitDone || stderr != "" || r.Report.Published != 60 || r.Report.Acknowledged != 60 || r.Report.Bytes != 12000 || r.Report.Latency.P99 <= 0 || r.Verdict != nil {
		t.Errorf("exit code %d, %s\n%s", code, stdout, stderr)
	}
}

// TestVerify: the server passes on what it takes, so it is its own upstream in passthrough.
func TestVerify(t *testing.T) {
	for _, lies := range []bool{false, true} {
		var n atomic.Int64
		s := mqtttest.New(t, mqtttest.Script{Publish: func(string, *mqtt.Publish) mqtttest.Answer {
			return mqtttest.Answer{Drop: lies && n.Add(1)%10 == 0}
		}})
		url := "mqtt://" + s.Addr
		code, stdout, stderr := call(t.Context(), "--broker", url, "--devices", "2", "--rate", "200", "--messages", "50", "--qos", "1", "--verify", url, "--verify-wait", "300ms")
		t.Logf("exit code %d\n%s%s", code, stdout, stderr)
		switch {
		case !lies:
			if code != exitDone || stderr != "" || !strings.Contains(stdout, "verdict            0 lost, 0 out of order, 0 never sent") || !strings.Contains(stdout, "arrived            100 messages") {
				t.Errorf("all arrived: exit code %d", code)
			}
		case code != exitFailed || !strings.Contains(stderr, "10 messages were acknowledged and did not arrive") || !strings.Contains(stdout, "verdict            10 lost") || !strings.Contains(stdout, "acknowledged, not arrived"):
			t.Errorf("the server lied: exit code %d", code)
		}
		// The devices keep their sessions, the subscriber leaves none behind.
		for deadline := time.Now().Add(10 * time.Second); s.Connected() > 0 || s.Sessions() != 2; {
			if time.Now().After(deadline) {
				t.Fatalf("%d connections and %d sessions are left, want 0 and 2", s.Connected(), s.Sessions())
			}
			<-time.After(time.Millisecond)
		}
	}
}

func TestVerifyWithoutAnUpstream(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{Connect: func(c *mqtt.Connect) mqtt.Connack {
		if strings.HasPrefix(c.ClientID, "firmware-sim-verify") {
			return mqtt.Connack{Reason: mqtt.NotAuthorized}
		}
		return mqtt.Connack{}
	}})
	code, _, stderr := call(t.Context(), "--broker", "mqtt://"+s.Addr, "--messages", "1", "--verify", "mqtt://"+s.Addr)
	if code != exitFailed || !strings.Contains(stderr, "--verify mqtt://"+s.Addr) {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

// TestSignalDrains: the first signal ends sampling, and what is in flash still goes out.
func TestSignalDrains(t *testing.T) {
	var taken atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	s := mqtttest.New(t, mqtttest.Script{Publish: func(string, *mqtt.Publish) mqtttest.Answer {
		if taken.Add(1) == 100 {
			cancel()
		}
		return mqtttest.Answer{}
	}})
	code, stdout, stderr := call(ctx, "--broker", "mqtt://"+s.Addr, "--qos", "1", "--rate", "100")
	if code != exitDone || stderr != "" || strings.Contains(stdout, "left on device") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestTLSAndPassword(t *testing.T) {
	dir := t.TempDir()
	cert, ca := selfSigned(t, dir)
	s := mqtttest.New(t, mqtttest.Script{
		TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
		Connect: func(c *mqtt.Connect) mqtt.Connack {
			if c.Username != "dev" || string(c.Password) != "secret" {
				return mqtt.Connack{Reason: mqtt.BadUsernameOrPassword}
			}
			return mqtt.Connack{}
		},
	})
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--broker", "mqtts://" + s.Addr, "--qos", "1", "--messages", "20", "--rate", "100", "--flaky", "0.3", "--username", "dev", "--password-file", password}
	if code, stdout, stderr := call(t.Context(), append(args, "--ca", ca)...); code != exitDone || !strings.Contains(stdout, "acknowledged       200 messages") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if code, _, stderr := call(t.Context(), append(args, "--messages", "0", "--duration", "1s", "--drain", "-1s")...); code != exitFailed || !strings.Contains(stderr, "certificate") {
		t.Errorf("without --ca: exit code %d\n%s", code, stderr)
	}
}

// selfSigned makes a certificate for 127.0.0.1 and gives it and the file to trust.
func selfSigned(t *testing.T, dir string) (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

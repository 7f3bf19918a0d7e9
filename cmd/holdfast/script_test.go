package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// The scripts in testdata are operators' stories with the real program: this test binary is it, when
// it is called by that name.
func TestMain(m *testing.M) {
	// Most of the time scripts wait for processes: more of them at once than there are processors. -parallel has the last word.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	testscript.Main(m, map[string]func(){
		"holdfast": main,
		"mqttdo":   func() { os.Exit(mqttdo(os.Args[1:])) },
		"mqttpub":  func() { os.Exit(mqttpub(os.Args[1:])) },
		"upstream": func() { os.Exit(upstream(os.Args[1:])) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                "testdata",
		ContinueOnError:    false,
		RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			// Fresh addresses on loopback, and certificates for 127.0.0.1.
			for _, name := range []string{"MQTT", "MQTT2", "HTTP", "UP"} {
				env.Setenv(name, testkit.FreeAddr(t))
			}
			// Something that answers as the API of a gateway with a device, and the token for it.
			f := newFakeGateway(t)
			f.addDevice("valve", nil)
			env.Setenv("API", f.address())
			if err := os.WriteFile(filepath.Join(env.WorkDir, "token"), []byte(fakeToken), 0o600); err != nil {
				return err
			}
			return writeCertificates(filepath.Join(env.WorkDir, "certs"))
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Getuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":   exits,
			"ready":   ready,
			"signal":  signalProcess,
			"expand":  expand,
			"waitfor": waitFor,
			"secret":  secret,
		},
	})
}

// exits CODE COMMAND...: the command ends with this code; its output can be looked at.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	if neg || err != nil {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// eventually polls until check returns nil, for 20 s.
func eventually(ts *testscript.TestScript, what string, check func() error) {
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s: still %v", what, err)
		}
		<-tick.C
	}
}

// ready ADDRESS: /readyz there answers 200.
func ready(ts *testscript.TestScript, _ bool, args []string) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	eventually(ts, "gateway at "+args[0], func() error {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+args[0]+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// waitfor TEXT FILE: the file contains the text.
func waitFor(ts *testscript.TestScript, _ bool, args []string) {
	eventually(ts, fmt.Sprintf("%q in %s", args[0], args[1]), func() error {
		b, err := os.ReadFile(ts.MkAbs(args[1]))
		if err != nil {
			return err
		}
		if !strings.Contains(string(b), args[0]) {
			return fmt.Errorf("not there:\n%s", b)
		}
		return nil
	})
}

// secret FILE: puts the secret of the JSON that the last command printed into the file.
func secret(ts *testscript.TestScript, _ bool, args []string) {
	var made struct{ Secret string }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &made))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(made.Secret), 0o600))
}

// signal SIGNAL DIR: sends the signal to the gateway that has the data directory open.
func signalProcess(ts *testscript.TestScript, _ bool, args []string) {
	b, err := os.ReadFile(filepath.Join(ts.MkAbs(args[1]), "holdfast.lock"))
	ts.Check(err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	ts.Check(err)
	sig, ok := map[string]syscall.Signal{"HUP": syscall.SIGHUP, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL, "ABRT": syscall.SIGABRT}[args[0]]
	if !ok {
		ts.Fatalf("unknown signal %s", args[0])
	}
	ts.Check(syscall.Kill(pid, sig))
}

// expand FILE...: replaces ${NAME} in files by the environment's value.
func expand(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		file := ts.MkAbs(name)
		b, err := os.ReadFile(file)
		ts.Check(err)
		ts.Check(os.WriteFile(file, []byte(os.Expand(string(b), ts.Getenv)), 0o600))
	}
}

// writeCertificates makes ca.pem, and server.pem and client.pem signed by it, with their keys.
func writeCertificates(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: name == "ca",
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		}
		if ca == nil {
			ca, caKey = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, &key.PublicKey, caKey)
		if err != nil {
			return err
		}
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		for suffix, block := range map[string]*pem.Block{".pem": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: raw}} {
			if err := os.WriteFile(filepath.Join(dir, name+suffix), pem.EncodeToMemory(block), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// mqttpub ADDRESS CLIENT QOS TOPIC PAYLOAD [CERTS]: publishes one message and prints what the answer
// was; with a folder of certificates over TLS, showing the client's: those of writeCertificates, or of
// holdfast cert. With PASSWORD_FILE in the environment it gives that password and its id as the user's name.
func mqttpub(args []string) int {
	addr, id, topic, payload := args[0], args[1], args[3], args[4]
	qos, err := strconv.Atoi(args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	acks := make(chan mqtt.Reason, 2)
	o := mqtt.ClientOptions{
		Address: addr, Connect: mqtt.Connect{Version: mqtt.V5, ClientID: id, CleanStart: true},
		OnAck: func(_ *mqtt.Client, a *mqtt.Ack) {
			if a.Type != mqtt.TypePubrec || a.Reason >= 0x80 {
				acks <- a.Reason
			}
		},
	}
	if file := os.Getenv("PASSWORD_FILE"); file != "" {
		password, err := os.ReadFile(file)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		o.Connect.Username, o.Connect.HasUsername = id, true
		o.Connect.Password, o.Connect.HasPassword = []byte(strings.TrimSpace(string(password))), true
	}
	if len(args) > 5 {
		caFile, pairFile := "ca.pem", [2]string{"client.pem", "client.key"}
		if _, err := os.Stat(filepath.Join(args[5], "ca.crt")); err == nil {
			caFile, pairFile = "ca.crt", [2]string{"devices/" + id + ".crt", "devices/" + id + ".key"}
		}
		pool := x509.NewCertPool()
		ca, err := os.ReadFile(filepath.Join(args[5], caFile))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		pool.AppendCertsFromPEM(ca)
		pair, err := tls.LoadX509KeyPair(filepath.Join(args[5], pairFile[0]), filepath.Join(args[5], pairFile[1]))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		o.TLS = &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", Certificates: []tls.Certificate{pair}}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Abort()
	p := &mqtt.Publish{QoS: byte(qos), Topic: []byte(topic), Payload: []byte(payload)}
	if qos > 0 {
		p.ID = 1
	}
	if err := c.Publish(p); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if qos > 0 {
		select {
		case r := <-acks:
			fmt.Println(r)
			if r >= 0x80 {
				return 1
			}
		case <-c.Done():
			fmt.Fprintln(os.Stderr, "connection ended:", c.Err())
			return 1
		case <-ctx.Done():
			fmt.Fprintln(os.Stderr, "no answer")
			return 1
		}
	}
	if err := c.Disconnect(mqtt.Success); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// mqttdo ADDRESS CLIENT ANSWER...: a device that answers its next command with each ANSWER, KIND or KIND=PAYLOAD, and goes.
// It prints what it was told.
func mqttdo(args []string) int {
	addr, id, answers := args[0], args[1], args[2:]
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	got := make(chan *mqtt.Publish, 1)
	acks := make(chan mqtt.Reason, len(answers))
	o := mqtt.ClientOptions{
		Address: addr, Connect: mqtt.Connect{Version: mqtt.V5, ClientID: id},
		OnAck: func(_ *mqtt.Client, a *mqtt.Ack) { acks <- a.Reason },
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
			got <- &mqtt.Publish{Topic: bytes.Clone(p.Topic), Payload: bytes.Clone(p.Payload)}
		},
	}
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	c, err := mqtt.Dial(ctx, o)
	if err != nil {
		return fail(err)
	}
	defer c.Abort()
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/" + id + "/req/#", QoS: 1}}}); err != nil {
		return fail(err)
	}
	select {
	case p := <-got:
		fmt.Printf("%s %s\n", p.Topic, p.Payload)
		levels := strings.Split(string(p.Topic), "/") // cmd/CLIENT/req/ID/NAME
		for n, a := range answers {
			kind, payload, _ := strings.Cut(a, "=")
			topic := strings.Join([]string{"cmd", id, "res", levels[3], kind}, "/")
			if err := c.Publish(&mqtt.Publish{ID: uint16(n + 1), QoS: 1, Topic: []byte(topic), Payload: []byte(payload)}); err != nil {
				return fail(err)
			}
			select {
			case r := <-acks:
				if r >= 0x80 {
					return fail(fmt.Errorf("%s: %v", a, r))
				}
			case <-ctx.Done():
				return fail(errors.New("no answer to " + a))
			}
		}
	case <-ctx.Done():
		return fail(errors.New("no command came"))
	}
	// The command is acknowledged after OnMessage; what is answered later has come after that.
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/" + id + "/req/#", QoS: 1}}}); err != nil {
		return fail(err)
	}
	if err := c.Disconnect(mqtt.Success); err != nil {
		return fail(err)
	}
	return 0
}

// upstream ADDRESS FILE [TOPIC]: a broker that takes everything but what is published on TOPIC, and writes a line for each message.
func upstream(args []string) int {
	f, err := os.OpenFile(args[1], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	dir, err := os.MkdirTemp("", "holdfast-upstream-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	store, err := kv.Open(dir, kv.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer store.Close()
	b, err := broker.New(broker.Config{Listeners: []broker.Listener{{Name: "up", Protocol: "mqtt", Address: args[0]}}},
		store, lineIntake{f, store}, doorTo{forbidden: append(args, "", "")[2]}, nil, slog.New(slog.DiscardHandler), nil)
	if err == nil {
		err = b.Listen()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := b.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// doorTo lets everybody in, and nobody publish on one topic.
type doorTo struct {
	openDoor
	forbidden string
}

func (d doorTo) Connect(context.Context, *broker.ConnectInfo) (broker.Rights, error) { return d, nil }
func (d doorTo) Rights(string) broker.Rights                                         { return d }
func (d doorTo) MayPublish(topic []byte) bool                                        { return string(topic) != d.forbidden }

type lineIntake struct {
	f     *os.File
	store *kv.Store
}

func (l lineIntake) Publish(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) error {
	fmt.Fprintf(l.f, "%s %s\n", m.Record.Topic, m.Record.Payload)
	return l.store.Apply(ops, done, token)
}

package firmwaresim_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
)

func TestEachDeviceHasItsOwnPassword(t *testing.T) {
	for _, username := range []string{"", "everybody"} {
		var mu sync.Mutex
		seen := map[string]string{}
		s := mqtttest.New(t, mqtttest.Script{Connect: func(c *mqtt.Connect) mqtt.Connack {
			mu.Lock()
			defer mu.Unlock()
			seen[c.ClientID] = c.Username + ":" + string(c.Password)
			return mqtt.Connack{}
		}})
		run(t, firmwaresim.Config{
			Broker: "mqtt://" + s.Addr, Devices: 3, Messages: 1, Rate: 100, Username: username,
			PasswordOf: func(device string) string { return "secret of " + device },
		})
		for _, d := range []string{"sim-00001", "sim-00003"} {
			user := username
			if user == "" {
				user = d
			}
			if want := user + ":secret of " + d; seen[d] != want {
				t.Errorf("%s logs in as %q, want %q", d, seen[d], want)
			}
		}
	}
}

// certificate makes one for 127.0.0.1 and this name, signed by parent, or by itself.
func certificate(t *testing.T, name string, parent *tls.Certificate) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: parent == nil, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	signer, signerKey := template, any(key)
	if parent != nil {
		signer, signerKey = parent.Leaf, parent.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, &key.PublicKey, signerKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func TestEachDeviceHasItsOwnCertificate(t *testing.T) {
	ca := certificate(t, "ca", nil)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	var mu sync.Mutex
	shown, asked := map[string]int{}, 0
	s := mqtttest.New(t, mqtttest.Script{TLS: &tls.Config{
		Certificates: []tls.Certificate{*certificate(t, "server", ca)}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
		VerifyConnection: func(c tls.ConnectionState) error {
			mu.Lock()
			defer mu.Unlock()
			shown[c.PeerCertificates[0].Subject.CommonName]++
			return nil
		},
	}})
	_, r := run(t, firmwaresim.Config{
		Broker: "mqtts://" + s.Addr, TLS: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}, Devices: 3, Messages: 10, Rate: 100, QoS: firmwaresim.QoS1, Drain: time.Second,
		CertificateOf: func(device string) (*tls.Certificate, error) {
			mu.Lock()
			defer mu.Unlock()
			if device == "sim-00002" && asked == 0 {
				asked++
				return nil, errors.New("it is not there yet")
			}
			return certificate(t, device, ca), nil
		},
	})
	if shown["sim-00001"] != 1 || shown["sim-00002"] != 1 || shown["sim-00003"] != 1 || len(shown) != 3 {
		t.Errorf("shown %v", shown)
	}
	if r.Errors["connect: it is not there yet"] != 1 || r.FailedConnects != 1 || r.Acknowledged != 30 {
		t.Errorf("%v", r)
	}
}

/* Go's net: one goroutine for each connection, buffers of 64 KB, flushed when the input is drained.
 * The modes are those of peer.h.
 */
package main

import (
	"bufio"
	"io"
	"net"
	"os"
)

var mode = "line"
var file *os.File
var content []byte

func echoLines(c net.Conn) {
	r, w := bufio.NewReaderSize(c, 65536), bufio.NewWriterSize(c, 65536)
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		w.Write(line)
		if r.Buffered() == 0 && w.Flush() != nil || mode == "once" {
			return
		}
	}
}

func sendFiles(c net.Conn) {
	r := bufio.NewReader(c)
	for {
		if _, err := r.ReadSlice('\n'); err != nil {
			return
		}
		if mode == "write" {
			if _, err := c.Write(content); err != nil {
				return
			}
			continue
		}
		own, err := os.Open(file.Name())
		if err == nil {
			_, err = io.Copy(c, own) /* sendfile */
			own.Close()
		}
		if err != nil {
			return
		}
	}
}

func serve(c net.Conn) {
	defer c.Close()
	switch mode {
	case "chunk":
		io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 65536))
	case "file", "write":
		sendFiles(c)
	default:
		echoLines(c)
	}
}

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	if len(os.Args) > 2 {
		mode = os.Args[2]
	}
	if mode == "file" || mode == "write" {
		file, _ = os.Open(os.Args[3])
		content, _ = os.ReadFile(os.Args[3])
	}
	for {
		c, err := l.Accept() /* TCP_NODELAY is the default */
		if err == nil {
			go serve(c)
		}
	}
}
